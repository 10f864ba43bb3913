"""Which kind of file a YAML or JSON mapping is, so that a file of the wrong kind is refused in one line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bbu.config.domains import DOMAINS, OWNERS, RETIRED

FLAT, SECTIONED = "a run config", "a run config in five sections"
_ENOUGH_KEYS = 5
"""A file with so many keys of a run config is meant as one, whatever else stands in it."""
_MARKS: dict[str, Collection[str]] = {
    "a cluster profile; name it with --cluster": ("executor", "work_folder"),
    "DeepSpeed's configuration; name it with --set deepspeed_config=…": ("zero_optimization",),
    "the config.json of a model; name its folder with --set model_path=…": ("model_type", "architectures"),
    "a vendor's annotation; name its folder with --set vendor_dir=…": ("markResult", "dataList", "info"),
    "a record of images; name its folder with --set data_root=…": ("images", "objects", "student"),
    "the manifest of a checkpoint; the config beside it is run_config.yaml": ("manifest_version", "files"),
}
"""What a file is that has one of these keys."""


def file_kind(data: Mapping[str, Any]) -> str | None:
    """FLAT or SECTIONED for what is meant as a run config, in that form; None for anything else."""
    sections = [value for value in data.values() if isinstance(value, dict)]
    inside = sum(key in OWNERS for section in sections for key in section)
    flat = sum(key in OWNERS or key in RETIRED for key, value in data.items() if not isinstance(value, dict))
    if max(inside, flat) < min(_ENOUGH_KEYS, len(data)) and not set(DOMAINS) & data.keys():
        return None
    return SECTIONED if inside > flat or (inside == flat and set(DOMAINS) & data.keys()) else FLAT


def wrong_kind(data: Mapping[str, Any]) -> str:
    """Say of a file that is no run config what it seems to be: the end of a sentence that begins with its name."""
    for kind, marks in _MARKS.items():
        if set(marks) & data.keys():
            return f"is no run config but {kind}"
    if _is_label_file(data):
        return "is no run config but a label file; name it with --set label_hierarchy_file=… or token_map_file=…"
    keys = ", ".join(list(data)[:3])
    return f"is no run config: it begins with {keys}; copy configs/base_flat.yaml, which states all {len(OWNERS)} keys"


def _is_label_file(data: Mapping[str, Any]) -> bool:
    """Whether all values are lists of texts (a hierarchy), or all are texts (a token map)."""
    values = list(data.values())
    lists = all(isinstance(value, list) and all(isinstance(item, str) for item in value) for value in values)
    return bool(values) and (lists or all(isinstance(value, str) for value in values))
