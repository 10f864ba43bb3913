"""Converts photos, whole or as shard i of n, and merges shards into the final files.

Every photo is converted on its own. Everything that needs all photos (split, teachers, report, hashes) happens in the
merge, from outcomes sorted by photo name. That is why the number of shards, processes or reruns cannot change a byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.conversion.contents import HashBudget
from bbu.conversion.drop import check_scale, choose_frames, frame_warnings, scale_warnings
from bbu.conversion.labels import LabelRules, load_rules
from bbu.conversion.listing import PhotoFiles, list_vendor_folder
from bbu.conversion.outputs import check_outputs
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome
from bbu.conversion.report import (
    ConversionReport,
    FileCounts,
    check_report,
    count_outcomes,
    dump_rejects,
    dump_report,
    find_warnings,
    is_in_records,
)
from bbu.conversion.reuse import (
    PhotoResult,
    confirm_result,
    convert_photos,
    is_worth_another_try,
    withdraw_hashes,
)
from bbu.conversion.shard_files import (
    read_results,
    read_shard,
    settings_fingerprint,
    shard_path,
    split_into_shards,
    write_shard,
)
from bbu.conversion.split import moved_sites, site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.errors import DataError
from bbu.run.files import write_atomic
from bbu.schema import REJECTS_FILE, REPORT_FILE, View, dump_line, photos_hash_path

_MOST_HASHED = 2**30
"""Bytes that may be read on a login node to find out whether shards are complete: some seconds."""


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
    """Convert the photos of one shard, except those that were converted before and have not changed.

    Args:
        config: what to convert and how.
        shard: which shard, from 0.
        shards: how many shards there are.

    Returns:
        The shard's file, for `merge_shards` to read.

    Raises:
        DataError: there are no photos, a folder cannot be read, or the label files are not usable.
        OSError: a photo cannot be written.
    """
    check_outputs(config)
    photos = split_into_shards(list_vendor_folder(Path(config.vendor_dir)).photos, shards)[shard]
    rules, path = load_rules(config), shard_path(config, shard, shards)
    fingerprint = settings_fingerprint(config, rules)
    earlier = read_results(config, fingerprint, path)
    usable = {name: result for name, result in earlier.items() if not is_worth_another_try(result)}
    write_shard(path, fingerprint, _current_results(photos, usable, config, rules))
    return path


def missing_shards(config: DataConfig, shards: int) -> list[int]:
    """List the shards that have work left: not there, of other settings, or with photos that came, went or changed.

    All `shards` of them where there are no photos yet.
    """
    if not Path(config.vendor_dir).is_dir():
        return list(range(shards))
    parts = split_into_shards(list_vendor_folder(Path(config.vendor_dir)).photos, shards)
    fingerprint, budget = settings_fingerprint(config, load_rules(config)), HashBudget(_MOST_HASHED)

    def is_complete(shard: int) -> bool:
        results = read_shard(shard_path(config, shard, shards), fingerprint)
        listed = {files.name: files for files in parts[shard]}
        return (
            results is not None
            and results.keys() == listed.keys()
            and not any(map(is_worth_another_try, results.values()))
            and all(confirm_result(each, listed[name], config, budget) for name, each in results.items())
        )

    return [shard for shard in range(shards) if not is_complete(shard)]


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
    listing = list_vendor_folder(Path(config.vendor_dir))
    results = _read_shards(config, shards, listing.photos)
    outcomes, exif = choose_frames(sorted(results, key=lambda outcome: outcome.name))
    photos, objects = count_outcomes(outcomes, config)
    files = FileCounts(listing.uncovered, listing.renamed)
    refused = ConversionReport(photos, objects, files, exif, written={}, val_sites=[], warnings=[])
    warnings = [*frame_warnings(exif), *scale_warnings(outcomes), *find_warnings(refused, config)]
    root = Path(config.data_root)
    _write_file(root / REJECTS_FILE, dump_rejects(outcomes, config))
    _write_file(root / REPORT_FILE, dump_report(replace(refused, warnings=warnings)))
    check_scale(outcomes)
    check_report(refused, config)
    split = _split_photos(outcomes, config)
    written = _write_records(split, outcomes, config)
    report = replace(refused, written=written, val_sites=split.val_sites, warnings=warnings + split.warnings)
    _write_file(root / REPORT_FILE, dump_report(report))
    return report


def _read_shards(config: DataConfig, shards: int, photos: Sequence[PhotoFiles]) -> list[PhotoOutcome]:
    """Read what became of each photo; what came or changed after its shard was made is converted now.

    Raises DataError where a shard is missing or was made under other settings.
    """
    paths = [shard_path(config, shard, shards) for shard in range(shards)]
    missing = [str(i) for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise DataError(f"shards {', '.join(missing)} of {shards} are missing; run `--shard I/{shards}` for each")
    rules = load_rules(config)
    fingerprint = settings_fingerprint(config, rules)
    outcomes: list[PhotoOutcome] = []
    for path, part in zip(paths, split_into_shards(photos, shards), strict=True):
        earlier = read_shard(path, fingerprint)
        if earlier is None:
            raise DataError(
                f"{path} was made under other settings or label files, or by another version, or is damaged; run this "
                "shard again"
            )
        results = _current_results(part, earlier, config, rules)
        if results != list(earlier.values()):
            write_shard(path, fingerprint, results)
        outcomes += [result.outcome for result in results]
    return outcomes


def _current_results(
    photos: Sequence[PhotoFiles], earlier: Mapping[str, PhotoResult], config: DataConfig, rules: LabelRules
) -> list[PhotoResult]:
    """What became of each photo: as before where that still holds, else the photo is converted."""
    results: dict[str, PhotoResult] = {}
    for files in photos:
        before = earlier.get(files.name)
        if before and (result := confirm_result(before, files, config)):
            results[files.name] = result
    left = [files for files in photos if files.name not in results]
    results |= {result.files.name: result for result in convert_photos(left, config, rules)}
    return [results[files.name] for files in photos]


def _write_records(split: _Split, outcomes: Sequence[PhotoOutcome], config: DataConfig) -> dict[str, int]:
    """Write the records files and the hashes of their photos, unless they are just so already.

    Returns the number of records by file.
    """
    root = Path(config.data_root)
    files = {config.train_file: split.train, config.val_file: split.val, config.teacher_file: split.teachers}
    sha256 = {photo.view.images[0]: photo.sha256 for photo in _photos(outcomes)}
    texts = {root / name: "".join(map(dump_line, views)) for name, views in files.items()}
    texts |= {photos_hash_path(root / name): _hash_photos(views, sha256) + "\n" for name, views in files.items()}
    if not all(path.is_file() and path.read_bytes() == text.encode() for path, text in texts.items()):
        withdraw_hashes(config)
        for path, text in texts.items():
            _write_file(path, text)
    return {name: len(views) for name, views in files.items()}


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
