"""Reports what a conversion kept, what it left out and why, for the person who received the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from bbu.config.domains import DataConfig
from bbu.conversion.drop import FrameChoice
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome
from bbu.conversion.rejects import Reject
from bbu.errors import DataError
from bbu.schema import REJECTS_FILE

_LABEL_REASONS = ("unknown_object_type", "unknown_property")
_FEWEST_KEPT = 0.01
"""Share of a drop's photos, or of its objects, up to which a conversion is refused: a wrong label file keeps a few by
accident."""
_LABELS_SHOWN = 3


@dataclass(frozen=True)
class PhotoCounts:
    """Numbers of photos."""

    seen: int
    """Photos in the vendor folder: a JSON, an image, or both."""
    rejected: dict[str, int]
    """Reason → photos that were left out as a whole."""
    negatives: int
    """Converted photos that show no object."""
    negatives_kept: bool
    """Whether photos without any object are in the records files."""
    emptied: int
    """Converted photos all of whose objects were rejected."""
    emptied_policy: str
    """Whether these are set aside, or treated as photos that show no object."""
    dialects: dict[str, int]
    """Dialect of the vendor's JSON → converted photos."""
    frames: dict[str, int]
    """Frame of the vendor's boxes → converted photos."""


@dataclass(frozen=True)
class ObjectCounts:
    """Numbers of objects."""

    kept: int
    """Objects of all converted photos."""
    clipped: int
    """Those of them that were cut at the image border."""
    rejected: dict[str, int]
    """Reason → objects that were left out as unusable, or as exact duplicates."""
    ignored: int
    """Objects with labels outside the hierarchy that were left out on purpose."""
    unknown_labels: dict[str, int]
    """What is unknown about a label outside the hierarchy → objects that have it; most frequent first."""
    respelled: dict[str, int]
    """Label that the label files write with other brackets or character widths → objects that have it."""
    labels: dict[str, int]
    """Description → objects that have it."""


@dataclass(frozen=True)
class FileCounts:
    """The vendor's files that are not what a conversion expects."""

    uncovered: dict[str, int]
    """Suffix or reason → files and links that are part of no photo."""
    renamed: dict[str, str]
    """Written photo, below image_folder and without suffix → its file, where that has another name."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of a vendor's folder. The field names are those of the report's file."""

    photos: PhotoCounts
    objects: ObjectCounts
    files: FileCounts
    exif: FrameChoice
    """How the photos were read whose EXIF frame their own size does not decide."""
    written: dict[str, int]
    """Records file, below data_root → records in it."""
    val_sites: list[str]
    """Sorted names of the sites that went to validation."""
    warnings: list[str]
    """What somebody should look at, in sentences."""


def _is_emptied(outcome: PhotoOutcome, config: DataConfig) -> bool:
    """Whether a converted photo lost all its objects to rejects, so that it is no photo that shows none."""
    return outcome.photo is not None and not outcome.photo.view.objects and any(_defects(outcome, config))


def is_in_records(outcome: PhotoOutcome, config: DataConfig) -> bool:
    """Whether a photo has its place in a records file."""
    if outcome.photo is None:
        return False
    is_set_aside = config.emptied_photo_policy == "set_aside" and _is_emptied(outcome, config)
    return bool(outcome.photo.view.objects) or (config.keep_negatives and not is_set_aside)


def count_outcomes(outcomes: Sequence[PhotoOutcome], config: DataConfig) -> tuple[PhotoCounts, ObjectCounts]:
    """Count photos and objects, kept and left out, by reason."""
    photos = [outcome.photo for outcome in outcomes if outcome.photo]
    rejects = [reject for outcome in outcomes for reject in outcome.rejects]
    emptied = sum(_is_emptied(outcome, config) for outcome in outcomes)
    photo_counts = PhotoCounts(
        seen=len(outcomes),
        rejected=_count(reject.reason for reject in rejects if reject.index is None),
        negatives=sum(not photo.view.objects for photo in photos) - emptied,
        negatives_kept=config.keep_negatives,
        emptied=emptied,
        emptied_policy=config.emptied_photo_policy,
        dialects=_count(photo.dialect for photo in photos),
        frames=_count(photo.frame for photo in photos),
    )
    return photo_counts, _count_objects(photos, rejects, config)


def find_warnings(report: ConversionReport, config: DataConfig) -> list[str]:
    """Say what of the counts somebody should look at, though it is no defect."""
    warnings = []
    if report.files.renamed:
        example = next(f"{file!r} is {name!r}" for name, file in report.files.renamed.items())
        warnings.append(
            f"{len(report.files.renamed)} photos are written under other names than their files have, which are not "
            f"UTF-8, too long, or one name where capitals or accents do not count: {example}"
        )
    if report.photos.emptied:
        fate = "set aside" if config.emptied_photo_policy == "set_aside" else "treated as photos that show no object"
        warnings.append(f"{report.photos.emptied} photos lost all their objects to rejects: {fate}")
    if report.objects.ignored:
        labels = _list_labels(report.objects.unknown_labels)
        warnings.append(f"{report.objects.ignored} objects with unknown labels are ignored on purpose: {labels}")
    if report.objects.respelled:
        labels = _list_labels(report.objects.respelled)
        warnings.append(
            "objects are labelled with other brackets or character widths than the label files have, and were read "
            f"without that difference: {labels}"
        )
    return warnings


def check_report(report: ConversionReport, config: DataConfig) -> None:
    """Check that enough was kept for training, and that no more was rejected than the config allows.

    Exact duplicates are no defects, nor are labels outside the hierarchy that the config ignores.

    Raises:
        DataError: no photo or object is kept, or hardly any; the share of rejected photos or objects exceeds
            `max_reject_share`; or labels are outside the hierarchy and `unknown_label_policy` is refuse.
    """
    photos, objects = report.photos, report.objects
    converted = photos.seen - sum(photos.rejected.values())
    if converted <= _FEWEST_KEPT * photos.seen:
        raise DataError(
            f"{converted} of {photos.seen} photos can be used, too few to learn from: rejected {photos.rejected}; see "
            f"{config.data_root}/{REJECTS_FILE} and repair the files"
        )
    unknown = sum(objects.unknown_labels.values())
    if unknown and config.unknown_label_policy == "refuse":
        raise DataError(f"{unknown} objects have {_unknown_labels(objects, config)}")
    defects = {r: n for r, n in objects.rejected.items() if r != "duplicate"}
    _check_kept(objects, sum(defects.values()), config)
    _check_share("photos", photos.rejected, photos.seen, config)
    hint = f". Some have {_unknown_labels(objects, config)}" if defects.keys() & set(_LABEL_REASONS) else ""
    _check_share("objects", defects, objects.kept + sum(defects.values()), config, hint)


def dump_rejects(outcomes: Sequence[PhotoOutcome], config: DataConfig) -> str:
    """Write one JSON line for each reject, in the order of the photos; ignored labels are none."""
    rejects = (asdict(each) for outcome in outcomes for each in outcome.rejects if not _is_ignored(each, config))
    return "".join(json.dumps(reject, ensure_ascii=False, sort_keys=True) + "\n" for reject in rejects)


def dump_report(report: ConversionReport) -> str:
    """Write the report as indented JSON that ends in a newline."""
    return json.dumps(asdict(report), ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def _count_objects(photos: Sequence[ConvertedPhoto], rejects: Sequence[Reject], config: DataConfig) -> ObjectCounts:
    objects = [item for photo in photos for item in photo.view.objects]
    object_rejects = [reject for reject in rejects if reject.index is not None]
    unknown = Counter(reject.detail for reject in object_rejects if reject.reason in _LABEL_REASONS)
    return ObjectCounts(
        kept=len(objects),
        clipped=sum(photo.clipped for photo in photos),
        rejected=_count(reject.reason for reject in object_rejects if not _is_ignored(reject, config)),
        ignored=sum(_is_ignored(reject, config) for reject in object_rejects),
        unknown_labels=_by_frequency(unknown),
        respelled=_by_frequency(Counter(label for photo in photos for label in photo.respelled)),
        labels=_count(item.desc for item in objects),
    )


def _is_ignored(reject: Reject, config: DataConfig) -> bool:
    return reject.reason in _LABEL_REASONS and config.unknown_label_policy == "ignore"


def _defects(outcome: PhotoOutcome, config: DataConfig) -> Iterator[Reject]:
    """The objects of a photo that should have been kept and are not."""
    for reject in outcome.rejects:
        if reject.index is not None and reject.reason != "duplicate" and not _is_ignored(reject, config):
            yield reject


def _check_kept(objects: ObjectCounts, defects: int, config: DataConfig) -> None:
    if objects.kept > _FEWEST_KEPT * (objects.kept + defects):
        return
    rejected = {reason: count for reason, count in objects.rejected.items() if reason != "duplicate"}
    labels = f"; they have {_unknown_labels(objects, config)}" if objects.unknown_labels else ""
    if "missing_label" in rejected:
        labels += f"; is language {config.language} the one that the vendor writes?"
    if not defects + objects.ignored:
        raise DataError(
            f"no photo of {config.vendor_dir} that can be used shows any object, so there is nothing to learn; correct "
            f"vendor_dir, or see {config.data_root}/{REJECTS_FILE}"
        )
    raise DataError(
        f"{objects.kept} of {objects.kept + defects + objects.ignored} objects kept, too few to learn from: rejected "
        f"{rejected}, ignored {objects.ignored}{labels}; see {config.data_root}/{REJECTS_FILE}"
    )


def _unknown_labels(objects: ObjectCounts, config: DataConfig) -> str:
    text = (
        f"labels outside {config.label_hierarchy_file}: {_list_labels(objects.unknown_labels)}; correct "
        f"label_hierarchy_file or token_map_file ({config.token_map_file}), or add the labels to them"
    )
    is_ignored = config.unknown_label_policy == "ignore"
    return text if is_ignored else f"{text}; unknown_label_policy ignore leaves such labels out on purpose"


def _list_labels(counts: Mapping[str, int]) -> str:
    """The most frequent of some labels, or of what is said of them, with their numbers of objects."""
    shown = [f"{text} ({count})" for text, count in list(counts.items())[:_LABELS_SHOWN]]
    return ", ".join(shown) + (", …" if len(counts) > _LABELS_SHOWN else "")


def _check_share(what: str, reasons: Mapping[str, int], seen: int, config: DataConfig, hint: str = "") -> None:
    rejected = sum(reasons.values())
    if rejected > config.max_reject_share * seen:
        raise DataError(
            f"{rejected} of {seen} {what} rejected {dict(reasons)}, over max_reject_share "
            f"{config.max_reject_share}; see {config.data_root}/{REJECTS_FILE}, repair the files or raise the share"
            + hint
        )


def _by_frequency(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
