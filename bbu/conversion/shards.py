"""Converts photos, whole or as shard i of n, and merges shards into the final files.

Every photo is converted on its own. Everything that needs all photos (split, teachers, report, hashes) happens in the
merge, from outcomes sorted by photo name. That is why the number of shards, processes or reruns cannot change a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from bbu.config.domains import DataConfig, keys_used_for
from bbu.conversion.drop import check_scale, choose_frames, frame_warnings, scale_warnings
from bbu.conversion.labels import load_rules
from bbu.conversion.outputs import check_outputs
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome, convert_photo, dump_outcome, parse_outcome
from bbu.conversion.report import (
    ConversionReport,
    check_report,
    count_outcomes,
    dump_rejects,
    dump_report,
    find_warnings,
    is_in_records,
)
from bbu.conversion.split import moved_sites, site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.conversion.vendor import list_photos
from bbu.errors import DataError
from bbu.run.files import write_atomic
from bbu.schema import REJECTS_FILE, REPORT_FILE, SHARD_FOLDER, View, dump_line, photos_hash_path

_SHARD_FORMAT = 3
"""Form of a shard's lines, part of its fingerprint. Shards of an older form are made again: form 1 holds no hashes of
photos, form 2 was made without the checks of damage, scale and EXIF frame."""


@dataclass(frozen=True)
class _Split:
    """The photos of each records file, and how they were chosen."""

    train: list[View]
    val: list[View]
    teachers: list[View]
    """Some of `train`, as worked examples."""
    val_sites: list[str]
    """Sorted names of the sites whose photos are all in `val`."""
    warnings: list[str]
    """What somebody should look at."""


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
    check_outputs(config)
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
        DataError: a shard is missing or was made from other settings or photos; or less was kept, or more rejected,
            than the config allows: then the reports are written, and the records files stay as they are.
    """
    check_outputs(config)
    outcomes, exif = choose_frames(sorted(_read_shards(config, shards), key=lambda outcome: outcome.name))
    photos, objects = count_outcomes(outcomes, config)
    refused = ConversionReport(photos, objects, exif, written={}, val_sites=[], warnings=[])
    warnings = [*frame_warnings(exif), *scale_warnings(outcomes), *find_warnings(refused, config)]
    root = Path(config.data_root)
    _write_file(root / REJECTS_FILE, dump_rejects(outcomes, config))
    _write_file(root / REPORT_FILE, dump_report(replace(refused, warnings=warnings)))
    check_scale(outcomes)
    check_report(refused, config)
    split = _split_photos(outcomes, config)
    files = {config.train_file: split.train, config.val_file: split.val, config.teacher_file: split.teachers}
    sha256 = {photo.view.images[0]: photo.sha256 for photo in _photos(outcomes)}
    for name, views in files.items():
        _write_file(root / name, "".join(map(dump_line, views)))
        _write_file(photos_hash_path(root / name), _hash_photos(views, sha256) + "\n")
    report = replace(
        refused,
        written={name: len(views) for name, views in files.items()},
        val_sites=split.val_sites,
        warnings=warnings + split.warnings,
    )
    _write_file(root / REPORT_FILE, dump_report(report))
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
        if outcome.photo and is_in_records(outcome, config)
    ]
    sites = [site for site, _ in site_and_view]
    chosen = val_sites(sites, config.val_ratio, config.split_seed)
    train = [view for site, view in site_and_view if site not in chosen]
    val = [view for site, view in site_and_view if site in chosen]
    teachers = choose_teachers(train, config.teacher_pool_size, config.split_seed)
    return _Split(train, val, teachers, sorted(chosen), list(_split_warnings(sites, train, val, config)))


def _split_warnings(
    sites: Sequence[str], train: Sequence[View], val: Sequence[View], config: DataConfig
) -> Iterator[str]:
    if not any(view.objects for view in train):
        raise DataError(
            f"all objects are in {config.val_file}, so there is nothing to learn; set another split_seed or a lower "
            "val_ratio"
        )
    if val and not any(view.objects for view in val):
        yield f"{config.val_file} shows no object, so that nothing can be scored; another split_seed gives other sites"
    for site in moved_sites(sites, config.val_ratio, config.split_seed):
        yield (
            f"too few sites for val_ratio {config.val_ratio}: {site} changed sides so that train and val both have "
            "one, and may change back when sites are added"
        )


def _hash_photos(views: Sequence[View], sha256: dict[str, str]) -> str:
    """SHA-256, in hex, over the path and the SHA-256 of each photo of a records file, sorted by path."""
    paths = sorted(path for view in views for path in view.images)
    return hashlib.sha256("".join(f"{sha256[path]}  {path}\n" for path in paths).encode()).hexdigest()


def _write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
