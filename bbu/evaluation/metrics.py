"""The metrics of an evaluation and what they depend on: the content of metrics.json."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.labels import Level
from bbu.run.files import write_atomic
from bbu.schema import Source
from bbu.strict_json import JsonError, build_dataclass

_RECORDED_ONLY = ("code_sha256", "image_sha256", "val_file")
"""Facts that no score depends on: the whole code and the whole image change with every commit, whatever it touches, and
a file's name may change while its content stays."""


def defined_score(value: Any) -> float | None:
    """A score as a result states it: None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else float(value)


@dataclass(frozen=True)
class Headline:
    """Class-aware scores at one IoU threshold."""

    iou: float
    """overlap from which a box counts as found"""
    precision: float | None
    """share of the predicted objects that are right; None without true or without predicted objects"""
    recall: float | None
    """share of the true objects that were found; None without true objects"""
    f1: float | None
    """harmonic mean of precision and recall; None without true objects"""


@dataclass(frozen=True)
class ImageCounts:
    """What became of the images and objects of the ground truth."""

    total: int
    """images of the ground truth"""
    not_predicted: int
    """images without any prediction record"""
    status: Mapping[str, int]
    """images by the status of their prediction (`ok`, `failed` ...)"""
    rejected: Mapping[str, int]
    """parts of answers that were rejected, by reason"""
    objects_true: int
    """objects of the ground truth"""
    objects_predicted: int
    """predicted objects that count for precision and recall"""


@dataclass(frozen=True)
class Metrics:
    """All metrics of one set of predictions."""

    headline: Headline
    """the scores that runs are compared by"""
    detection: Mapping[str, Mapping[str, float | None]]
    """for each way to compare labels (`detection.AGREEING_LEVELS`), the values of `detection.summarise`"""
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]]
    """[low, high] of the same values by the bootstrap; empty without resamples"""
    interval_level: float
    """confidence of the intervals, 0 to 1"""
    average_precision: Mapping[str, Any] | None
    """COCO's AP and AR, `score_source`, and `max_detections`, the most boxes of an image that AP counts; None for
    predictions without scores"""
    images: ImageCounts
    """what became of the images"""
    labels: Mapping[Level, Mapping[str, Any]]
    """the scores of each level of a label (`labels.score_labels`)"""
    absent_classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """for each predicted class that the ground truth lacks: `predicted` objects that count for precision, and `scored`
    ones, whatever their score, that class-aware average precision leaves out"""
    prediction_limit: int | None = None
    """most objects that the source reports for an image; None where it has no limit, and in older files"""
    over_limit: int = 0
    """images with more true objects than that"""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metrics:
        """Take the metrics from the content of a metrics.json; other fields are ignored.

        Raises JsonError where a field is missing or of another type.
        """
        metrics = build_dataclass(cls, _fields_of(cls, data))
        for row in metrics.labels.values():
            build_dataclass(_LevelScores, row)
        precisions = dict(metrics.average_precision or {})
        facts = {name: precisions.pop(name, None) for name in ("score_source", "max_detections")}
        build_dataclass(_AveragePrecision, facts | {"modes": precisions})
        if any(
            pair is not None and len(pair) != 2 for values in metrics.intervals.values() for pair in values.values()
        ):
            raise JsonError("an interval is not two numbers")
        return metrics


@dataclass(frozen=True)
class ScoreFacts:
    """What a score was computed from. None where an older version did not record it."""

    checkpoint_manifest_sha256: str
    """hash of the checkpoint's MANIFEST.json, which names every file of it"""
    dataset_sha256: str
    """hash of the file with the ground truth"""
    config: Mapping[str, Any]
    """the config keys that a score depends on"""
    source: Source
    """what predicted"""
    teachers: int
    """worked examples before each photo"""
    teachers_sha256: str | None
    """hash of the file that the worked examples come from; None without examples"""
    code_sha256: str
    """hash of the whole package; not part of the key"""
    image_sha256: str | None
    """the container image, None outside of one; not part of the key"""
    photos_sha256: str | None = None
    """hash over the photos' bytes, as conversion took it; None also where no conversion left one"""
    teacher_photos_sha256: str | None = None
    """the same over the photos of the worked examples"""
    label_scheme_sha256: str | None = None
    """hash of the label hierarchy and the response types"""
    score_code_sha256: str | None = None
    """hash of the code that a score depends on, without comments and docstrings"""
    packages: Mapping[str, str | None] | None = None
    """versions of the Python packages that a score depends on"""
    val_file: str | None = None
    """name of the file with the ground truth; not part of the key"""

    def key(self) -> str:
        """The name of this evaluation: SHA-256 in hex over everything that the result depends on.

        Equal facts give equal keys whatever the order of `config`.
        """
        facts = {name: value for name, value in asdict(self).items() if name not in _RECORDED_ONLY}
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class EvaluationResult:
    """The content of metrics.json: one checkpoint's metrics and what they depend on, side by side in one object."""

    step: int
    """the checkpoint's step"""
    key: str
    """the evaluation's name in the ledger"""
    metrics: Metrics
    """how well it did"""
    facts: ScoreFacts
    """what that depends on"""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """Take the content of a metrics.json, of this version or an older one; unknown fields are ignored.

        Raises CheckpointError where it is damaged.
        """
        try:
            facts = build_dataclass(ScoreFacts, _fields_of(ScoreFacts, data))
            place = build_dataclass(_Place, {name: data.get(name) for name in ("step", "key")})
            return cls(place.step, place.key, Metrics.from_dict(data), facts)
        except JsonError as error:
            raise CheckpointError(
                f"a damaged score in eval/ledger/results ({error}); remove it to score again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {**asdict(self.metrics), "step": self.step, "key": self.key, **asdict(self.facts)}


@dataclass(frozen=True)
class _Place:
    """Which evaluation a file is about; see EvaluationResult."""

    step: int
    """the checkpoint's step"""
    key: str
    """the evaluation's name in the ledger"""


@dataclass(frozen=True)
class _ClassScores:
    """The scores of one class on one level; see `labels.score_labels`."""

    support: int
    """true objects"""
    predicted: int
    """matched and spurious predictions"""
    correct: int
    """matches with the same class"""
    precision: float | None
    """None where there is no score"""
    recall: float | None
    """None where there is no score"""
    f1: float | None
    """None where there is no score"""


@dataclass(frozen=True)
class _LevelScores:
    """The scores of one level; see `labels.score_labels`."""

    accuracy: float | None
    """None where there is no score"""
    support: int
    """matched objects whose truth has the level"""
    confusion: Mapping[str, Mapping[str, int]]
    """true class, predicted class, count"""
    per_class: Mapping[str, _ClassScores]
    """by class"""


@dataclass(frozen=True)
class _AveragePrecision:
    """The content of `Metrics.average_precision`."""

    score_source: str | None
    """what the scores are"""
    max_detections: int | None
    """most boxes of an image that AP counts"""
    modes: Mapping[str, Mapping[str, float | None]]
    """COCO's numbers for each way to compare labels"""


def write_metrics(path: Path, result: EvaluationResult) -> None:
    """Write metrics.json whole or not at all."""
    text = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True)
    write_atomic(path, text + "\n")


def _fields_of(cls: type[Metrics | ScoreFacts], data: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: data[item.name] for item in fields(cls) if item.name in data}
