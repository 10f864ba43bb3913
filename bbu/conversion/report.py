"""Reports what a conversion kept, what it left out and why, for the person who received the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from bbu.config.domains import DataConfig
from bbu.conversion.photo import PhotoOutcome
from bbu.errors import DataError

REPORT_FILE = "conversion_report.json"
REJECTS_FILE = "rejects.jsonl"
_LABEL_REASONS = ("unknown_object_type", "unknown_property")


@dataclass(frozen=True)
class PhotoCounts:
    """Numbers of photos."""

    seen: int
    """Photos in the vendor folder: a JSON, an image, or both."""
    rejected: dict[str, int]
    """Reason → photos that were left out as a whole."""
    negatives: int
    """Converted photos without any object."""
    negatives_kept: bool
    """Whether photos without any object are in the records files."""
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
    """Reason → objects that were left out."""
    labels: dict[str, int]
    """Description → objects that have it."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of a vendor's folder. The field names are those of the report's file."""

    photos: PhotoCounts
    objects: ObjectCounts
    written: dict[str, int]
    """Records file, below data_root → records in it."""
    val_sites: list[str]
    """Sorted names of the sites that went to validation."""


def count_outcomes(outcomes: Sequence[PhotoOutcome], config: DataConfig) -> tuple[PhotoCounts, ObjectCounts]:
    """Count photos and objects, kept and left out, by reason."""
    photos = [outcome.photo for outcome in outcomes if outcome.photo]
    objects = [item for photo in photos for item in photo.view.objects]
    rejects = [reject for outcome in outcomes for reject in outcome.rejects]
    photo_counts = PhotoCounts(
        seen=len(outcomes),
        rejected=_count(reject.reason for reject in rejects if reject.index is None),
        negatives=sum(not photo.view.objects for photo in photos),
        negatives_kept=config.keep_negatives,
        dialects=_count(photo.dialect for photo in photos),
        frames=_count(photo.frame for photo in photos),
    )
    object_counts = ObjectCounts(
        kept=len(objects),
        clipped=sum(photo.clipped for photo in photos),
        rejected=_count(reject.reason for reject in rejects if reject.index is not None),
        labels=_count(item.desc for item in objects),
    )
    return photo_counts, object_counts


def check_rejects(report: ConversionReport, config: DataConfig) -> None:
    """Check that no more photos and objects were rejected than the config allows.

    Duplicates and labels outside the hierarchy are no defects: they are filtered because the config says so.

    Raises:
        DataError: the share of rejected photos or objects exceeds `max_reject_share`, or labels are outside the
            hierarchy and `unknown_label_policy` is refuse.
    """
    photos, objects = report.photos, report.objects
    defects = {r: n for r, n in objects.rejected.items() if r not in (*_LABEL_REASONS, "duplicate")}
    _check_share("photos", photos.rejected, photos.seen, config)
    _check_share("objects", defects, objects.kept + sum(defects.values()), config)
    unknown = sum(objects.rejected.get(reason, 0) for reason in _LABEL_REASONS)
    if unknown and config.unknown_label_policy == "refuse":
        raise DataError(
            f"{unknown} objects have labels outside {config.label_hierarchy_file}; see "
            f"{config.data_root}/{REJECTS_FILE}, add the labels or set unknown_label_policy to drop"
        )


def dump_rejects(outcomes: Sequence[PhotoOutcome]) -> str:
    """Write one JSON line for each reject, in the order of the photos."""
    rejects = (asdict(reject) for outcome in outcomes for reject in outcome.rejects)
    return "".join(json.dumps(reject, ensure_ascii=False, sort_keys=True) + "\n" for reject in rejects)


def dump_report(report: ConversionReport) -> str:
    """Write the report as indented JSON that ends in a newline."""
    return json.dumps(asdict(report), ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def _check_share(what: str, reasons: Mapping[str, int], seen: int, config: DataConfig) -> None:
    rejected = sum(reasons.values())
    if rejected > config.max_reject_share * seen:
        raise DataError(
            f"{rejected} of {seen} {what} rejected {dict(reasons)}, over max_reject_share "
            f"{config.max_reject_share}; see {config.data_root}/{REJECTS_FILE}, repair the files or raise the share"
        )


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
