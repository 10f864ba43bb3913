"""Converts photos, whole or as shard i of n, and merges shards into the final files.

Every photo is converted on its own. Everything that needs all photos (split, teachers, report, hashes) happens in the
merge, from outcomes sorted by photo name. That is why the number of shards, processes or reruns cannot change a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bbu.config.domains import DataConfig, keys_used_for
from bbu.conversion.labels import load_rules
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome, convert_photo, dump_outcome, parse_outcome
from bbu.conversion.report import (
    REJECTS_FILE,
    REPORT_FILE,
    ConversionReport,
    check_rejects,
    count_outcomes,
    dump_rejects,
    dump_report,
)
from bbu.conversion.split import site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.conversion.vendor import list_photos
from bbu.errors import DataError
from bbu.run.files import write_atomic
from bbu.schema import View, dump_line, photos_hash_path

SHARD_FOLDER = ".shards"
_SHARD_FORMAT = 2
"""Form of a shard's lines, part of its fingerprint. Shards of form 1 hold no hashes of photos: they are made again."""


@dataclass(frozen=True)
class _Split:
    """The photos of each records file, and how they were chosen."""

    train: list[View]
    val: list[View]
    teachers: list[View]
    """Some of `train`, as worked examples."""
    val_sites: list[str]
    """Sorted names of the sites whose photos are all in `val`."""


def convert_shard(config: DataConfig, shard: int, shards: int) -> Path:
    """Convert the photos of one shard.

    Args:
        config: what to convert and how.
        shard: which shard, from 0.
        shards: how many shards there are.

    Returns:
        The shard's file, for `merge_shards` to read.

    Raises:
        DataError: there are no photos, or the label files are not usable.
    """
    names = _photo_names(config)[shard::shards]
    convert = partial(convert_photo, config=config, rules=load_rules(config))
    header = {"fingerprint": _fingerprint(config), "photos": len(names)}
    lines = map(dump_outcome, _convert_all(convert, names, config))
    path = _shard_path(config, shard, shards)
    _write_file(path, json.dumps(header, sort_keys=True) + "\n" + "".join(lines))
    return path


def missing_shards(config: DataConfig, shards: int) -> list[int]:
    """List the shards that a merge could not take: not there, or made from other settings or photos.

    All `shards` of them where there are no photos yet.
    """
    if not Path(config.vendor_dir).is_dir():
        return list(range(shards))
    fingerprint = _fingerprint(config)
    return [shard for shard in range(shards) if _made_from(_shard_path(config, shard, shards)) != fingerprint]


def merge_shards(config: DataConfig, shards: int) -> ConversionReport:
    """Merge all shards: write the records files, the hashes of their photos and the reports.

    Args:
        config: the config that the shards were made under.
        shards: how many shards there are.

    Returns:
        The report, as it is written.

    Raises:
        DataError: a shard is missing or was made from other settings or photos; or, after everything is written,
            more was rejected than the config allows.
    """
    outcomes = sorted(_read_shards(config, shards), key=lambda outcome: outcome.name)
    split = _split_photos(outcomes, config)
    files = {config.train_file: split.train, config.val_file: split.val, config.teacher_file: split.teachers}
    sha256 = {photo.view.images[0]: photo.sha256 for photo in _photos(outcomes)}
    photos, objects = count_outcomes(outcomes, config)
    report = ConversionReport(photos, objects, {name: len(views) for name, views in files.items()}, split.val_sites)
    root = Path(config.data_root)
    for name, views in files.items():
        _write_file(root / name, "".join(map(dump_line, views)))
        _write_file(photos_hash_path(root / name), _hash_photos(views, sha256) + "\n")
    _write_file(root / REJECTS_FILE, dump_rejects(outcomes))
    _write_file(root / REPORT_FILE, dump_report(report))
    check_rejects(report, config)
    return report


def _photo_names(config: DataConfig) -> list[str]:
    folder = Path(config.vendor_dir)
    if not folder.is_dir():
        raise DataError(f"vendor_dir {folder} is not a folder; correct it, or draw one with `python -m bbu.demo`")
    names = list_photos(folder)
    if not names:
        raise DataError(f"vendor_dir {folder} holds no .json, .jpeg or .jpg; correct vendor_dir")
    return names


def _convert_all(convert: partial[PhotoOutcome], names: list[str], config: DataConfig) -> list[PhotoOutcome]:
    processes = min(config.convert_processes or os.cpu_count() or 1, len(names))
    if processes <= 1:
        return [convert(name) for name in names]
    with ProcessPoolExecutor(processes) as pool:
        # Few photos at a time, so that no process has much left when the others are done.
        return list(pool.map(convert, names, chunksize=4))


def _fingerprint(config: DataConfig) -> str:
    """SHA-256 of the settings, the label rules and the photo list that a shard is made from."""
    settings = {name: getattr(config, name) for name in keys_used_for("shard")}
    facts = [_SHARD_FORMAT, settings, asdict(load_rules(config)), _photo_names(config)]
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _shard_path(config: DataConfig, shard: int, shards: int) -> Path:
    return Path(config.data_root) / SHARD_FOLDER / f"of-{shards}" / f"{shard}.jsonl"


def _made_from(path: Path) -> str | None:
    """The fingerprint of a shard's file; None where there is no file."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())["fingerprint"]


def _read_shards(config: DataConfig, shards: int) -> list[PhotoOutcome]:
    paths = [_shard_path(config, shard, shards) for shard in range(shards)]
    missing = [str(i) for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise DataError(f"shards {', '.join(missing)} of {shards} are missing; run `--shard I/{shards}` for each")
    fingerprint = _fingerprint(config)
    return [outcome for path in paths for outcome in _read_shard(path, fingerprint)]


def _read_shard(path: Path, fingerprint: str) -> list[PhotoOutcome]:
    if _made_from(path) != fingerprint:
        raise DataError(f"{path} was made from other settings or photos, or by another version; run this shard again")
    # Not splitlines(): a text of the vendor may hold U+2028 and its like, which do not end a JSON line.
    _, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [parse_outcome(line) for line in lines]


def _photos(outcomes: Iterable[PhotoOutcome]) -> list[ConvertedPhoto]:
    return [outcome.photo for outcome in outcomes if outcome.photo]


def _split_photos(outcomes: Sequence[PhotoOutcome], config: DataConfig) -> _Split:
    site_and_view = [
        (site_of(outcome.name, config.site_pattern), outcome.photo.view)
        for outcome in outcomes
        if outcome.photo and (outcome.photo.view.objects or config.keep_negatives)
    ]
    chosen = val_sites((site for site, _ in site_and_view), config.val_ratio, config.split_seed)
    train = [view for site, view in site_and_view if site not in chosen]
    val = [view for site, view in site_and_view if site in chosen]
    return _Split(train, val, choose_teachers(train, config.teacher_pool_size, config.split_seed), sorted(chosen))


def _hash_photos(views: Sequence[View], sha256: dict[str, str]) -> str:
    """SHA-256, in hex, over the path and the SHA-256 of each photo of a records file, sorted by path."""
    paths = sorted(path for view in views for path in view.images)
    return hashlib.sha256("".join(f"{sha256[path]}  {path}\n" for path in paths).encode()).hexdigest()


def _write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
