"""The files of shards: what was made of each photo, by which settings and label rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bbu.config.domains import DataConfig, keys_used_for
from bbu.conversion.contents import FileFacts
from bbu.conversion.labels import LabelRules
from bbu.conversion.listing import PhotoFiles
from bbu.conversion.photo import outcome_to_dict, parse_outcome
from bbu.conversion.reuse import PhotoResult
from bbu.conversion.split import stable_hash
from bbu.errors import DataError
from bbu.run.files import write_atomic
from bbu.schema import SHARD_FOLDER

_SHARD_FORMAT = 5
"""Form of a shard's lines, part of its fingerprint. Change it with every change of what a photo is converted to: photos
are converted again then. Form 1 held no hashes of photos, 2 was made without the checks of damage, scale and EXIF
frame, 3 did not say which files a photo was made from, 4 was resized by Pillow."""


def shard_path(config: DataConfig, shard: int, shards: int) -> Path:
    """The file of shard `shard`, from 0, of `shards`."""
    return Path(config.data_root) / SHARD_FOLDER / f"of-{shards}" / f"{shard}.jsonl"


def split_into_shards(photos: Iterable[PhotoFiles], shards: int) -> list[list[PhotoFiles]]:
    """The photos of each shard: a photo stays in its shard when others come and go."""
    parts: list[list[PhotoFiles]] = [[] for _ in range(shards)]
    for files in photos:
        parts[int(stable_hash(0, files.name)[:8], 16) % shards].append(files)
    return parts


def settings_fingerprint(config: DataConfig, rules: LabelRules) -> str:
    """SHA-256 of the settings and label rules that a photo is converted by."""
    settings = {name: getattr(config, name) for name in keys_used_for("shard")}
    text = json.dumps([_SHARD_FORMAT, settings, asdict(rules)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard(path: Path, fingerprint: str, results: Sequence[PhotoResult]) -> None:
    """Write a shard's file. Equal results give equal bytes."""
    header = {"fingerprint": fingerprint, "photos": len(results)}
    lines = [json.dumps(each, sort_keys=True) + "\n" for each in (header, *map(_result_to_dict, results))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))


def read_shard(path: Path, fingerprint: str) -> dict[str, PhotoResult] | None:
    """Read a shard's file.

    Returns:
        Name of a photo → what became of it; None where there is no file, where it was made under another fingerprint,
        or where it is damaged.
    """
    try:
        # Lines end at "\n" alone: a text may hold U+2028 and its like.
        with path.open(encoding="utf-8", newline="\n") as lines:
            header = json.loads(next(lines, ""))
            if header["fingerprint"] != fingerprint:
                return None
            results = [_parse_result(json.loads(line)) for line in lines]
        return {result.files.name: result for result in results} if len(results) == header["photos"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError):
        return None


def read_results(config: DataConfig, fingerprint: str, path: Path) -> dict[str, PhotoResult]:
    """Read what was made by the same settings and label rules, for a shard that is about to be made.

    Its own file says so; where that is of no use, the files of a conversion in another number of shards do.

    Args:
        config: where the files of shards lie.
        fingerprint: of the settings and label rules.
        path: the shard's own file.
    """
    results = read_shard(path, fingerprint)
    if results is not None:
        return results
    others = sorted((Path(config.data_root) / SHARD_FOLDER).glob("of-*/*.jsonl"))
    return {name: result for other in others for name, result in (read_shard(other, fingerprint) or {}).items()}


def _result_to_dict(result: PhotoResult) -> dict[str, Any]:
    return {
        "files": asdict(result.files),
        "sources": {path: asdict(facts) for path, facts in result.sources.items()},
        "written": result.written and asdict(result.written),
        "outcome": outcome_to_dict(result.outcome),
    }


def _parse_result(data: dict[str, Any]) -> PhotoResult:
    files: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data["files"].items()}
    sources = {path: FileFacts(**facts) for path, facts in data["sources"].items()}
    written = FileFacts(**data["written"]) if data["written"] else None
    return PhotoResult(PhotoFiles(**files), sources, written, parse_outcome(data["outcome"]))
