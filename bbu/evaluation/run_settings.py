"""What a run's scores are measured on and under, and in what an evaluation differs from that.

A run is judged by its validation file and its settings. An evaluation on other photos, such as those it was trained
on, or under another threshold, is not comparable with its scores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import keys_used_for
from bbu.config.yaml_files import read_yaml
from bbu.errors import CheckpointError, ConfigError
from bbu.run.folder import RunFolder
from bbu.run.provenance import file_hash
from bbu.schema import read_photos_hash
from bbu.strict_json import read_json

logger = logging.getLogger(__name__)

_FACT_NAMES = {"dataset_sha256": "val_file", "val_file": "val_file", "photos_sha256": "photos"}
"""Facts of an evaluation that must be equal → what people call them."""


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that its scores depend on, as far as its folder and its data state them."""

    config: Mapping[str, Any]
    """the run's config.yaml; empty where there is none"""
    facts: Mapping[str, str]
    """values of some of _FACT_NAMES"""

    @classmethod
    def of_run(cls, run: RunFolder) -> RunSettings:
        """Read the settings of a run. A file that cannot be read is logged, and nothing is compared with it."""
        try:
            config = read_yaml(run.config) if run.config.is_file() else {}
            return cls(config, _ground_truth_facts(run, config))
        except (ConfigError, CheckpointError) as error:
            logger.warning("%s", error)
            return cls({}, {})

    def differences(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the settings in which an evaluation differs from the run.

        What either side does not state, as older versions did not, is no difference. The run's own evaluations have no
        worked examples.

        Args:
            record: the content of a metrics.json.
        """
        facts = [name for key, name in _FACT_NAMES.items() if _differ(self.facts.get(key), record.get(key))]
        teachers = ["teachers"] if record.get("teachers") else []
        config = record.get("config")
        theirs = config if isinstance(config, dict) else {}
        keys = [key for key in keys_used_for("score") if _differ(self.config.get(key), theirs.get(key))]
        return (*facts[:1], *teachers, *keys)  # other records have other photos, which needs no second mark


def _differ(ours: Any, theirs: Any) -> bool:
    return ours is not None and theirs is not None and ours != theirs


def _ground_truth_facts(run: RunFolder, config: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the validation file that the run was trained beside.

    It is the file as a start of the run recorded it: one that was changed later, perhaps by another split, is not the
    run's own. Without a record (an older version) the file as it is now counts, and without that its name.
    """
    root, name = config.get("data_root"), config.get("val_file")
    if not isinstance(root, str) or not isinstance(name, str):
        return {}
    path = Path(root) / name
    present = file_hash(path) if path.is_file() else None
    recorded = _recorded_hashes(run, path.name)
    # Not always the last one: a start that failed may have named other data.
    expected = present if present in recorded or not recorded else recorded[-1]
    if expected is None:
        return {"val_file": name}
    photos = read_photos_hash(path) if present == expected else None
    return {"dataset_sha256": expected} | ({"photos_sha256": photos} if photos else {})


def _recorded_hashes(run: RunFolder, name: str) -> list[str]:
    """The hashes of a data file as the starts of the run recorded them, oldest first."""
    if not run.provenance.is_file():
        return []
    content = read_json(run.provenance, CheckpointError, "move it away, the next start writes a new one")
    starts = content.get("starts")
    hashes = [_hash_in_start(start, name) for start in (starts if isinstance(starts, list) else [])]
    return [value for value in hashes if value is not None]


def _hash_in_start(start: Any, name: str) -> str | None:
    match start:
        case {"data_sha256": {**hashes}} if isinstance(value := hashes.get(name), str):
            return value
    return None
