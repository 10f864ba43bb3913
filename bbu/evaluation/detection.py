"""Detection scores on COCO's matches.

Generated answers carry no scores, so the headline is precision, recall and F1 at IoU 0.5, 0.75 and the mean over
0.5:0.95, with and without the class. Where a named source gave scores, COCO's AP and AR are added. Every image of
the ground truth counts, whatever became of its prediction: a failed image is an image where all was missed.

Over no true object there is no score, and a precision needs predictions: such values are NaN in arrays and None in
results, never a perfect 1 or a 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bbu.errors import DataError
from bbu.evaluation.average_precision import ignored_boxes
from bbu.evaluation.matching import IOU_THRESHOLDS, ClassOf, Overlaps, Pairing, classify_boxes, match_boxes
from bbu.evaluation.metrics import Headline, defined_score
from bbu.evaluation.predictions import Prediction
from bbu.labels import LEVELS, LabelScheme, Level
from bbu.schema import View

AGREEING_LEVELS: dict[str, tuple[Level, ...]] = {
    "class_agnostic": (), "type": LEVELS[:1], "property": LEVELS[:2], "class_aware": LEVELS,
}  # fmt: skip
"""The ways to score boxes by name: which levels of two labels must agree before their boxes are compared."""
_RESAMPLES_AT_ONCE = 100
"""Of the bootstrap: 80 MB for 100,000 images."""


@dataclass(frozen=True)
class Counts:
    """Per-image counts. `matched`: [T, I] for T IoU thresholds; `predicted`, `truth`: [I]."""

    matched: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray


def pair_up(views: Sequence[View], predictions: Sequence[Prediction]) -> list[Pairing]:
    """Join ground truth and predictions by image path, in the order of the ground truth.

    An image without prediction is kept with none. Raises DataError for an image that is twice in the ground truth,
    predicted twice, predicted but not in the ground truth, or predicted at another size (its boxes would live in
    other pixels).
    """
    listed = Counter(view.images[0] for view in views)
    if repeated := [image for image, times in listed.items() if times > 1]:
        raise DataError(f"{repeated[0]}: twice in the ground truth; remove one of the two records")
    by_image: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.image in by_image:
            raise DataError(f"{prediction.image}: predicted twice; remove one of the two records")
        by_image[prediction.image] = prediction
    pairs = [_pairing(view, by_image.pop(view.images[0], None)) for view in views]
    if by_image:
        raise DataError(f"{next(iter(by_image))}: predicted but not in the ground truth; use the file it came from")
    return pairs


def _pairing(view: View, prediction: Prediction | None) -> Pairing:
    if prediction is None:
        return Pairing(view.objects, ())
    for truth, predicted in ((view.width, prediction.width), (view.height, prediction.height)):
        if truth is not None and predicted is not None and truth != predicted:
            raise DataError(
                f"{prediction.image}: predicted at {prediction.width}x{prediction.height}, ground truth at "
                f"{view.width}x{view.height}; predict again with the resize of this dataset"
            )
    return Pairing(view.objects, prediction.objects, prediction.scores)


def class_by_levels(scheme: LabelScheme, levels: Sequence[Level]) -> ClassOf:
    """Make the texts of some levels of its label the class of a description; no levels make all boxes one class."""

    def class_of(description: str) -> tuple[str, ...]:
        label = scheme.parse_description(description)
        return tuple(label.text_of(level) for level in levels)

    return class_of


def most_boxes(pairings: Sequence[Pairing]) -> int:
    """The most boxes of one image, true or predicted; at least 1."""
    return max((len(boxes) for pair in pairings for boxes in (pair.truth, pair.predicted)), default=0) or 1


def count_matches(overlaps: Overlaps, class_of: ClassOf, min_score: float = 0.0) -> Counts:
    """Count the matched, predicted and true boxes of each image; only boxes of the same class match.

    Predictions with a score below `min_score` do not count.
    """
    matches = match_boxes(overlaps, classify_boxes(overlaps, class_of), ignored_boxes(overlaps.truth.area))
    eligible = overlaps.scores >= min_score
    photo = overlaps.predicted.photo
    matched = [np.bincount(photo[(row >= 0) & eligible], minlength=overlaps.photos) for row in matches]
    predicted = np.bincount(photo[eligible], minlength=overlaps.photos)
    return Counts(np.stack(matched), predicted, np.bincount(overlaps.truth.photo, minlength=overlaps.photos))


def matched_descriptions(
    overlaps: Overlaps, iou: float = 0.5, min_score: float = 0.0
) -> list[tuple[str | None, str | None]]:
    """(true, predicted) description of boxes matched at IoU `iou` without regard to labels.

    A missed object has None as its second, a spurious prediction None as its first. Predictions with a score below
    `min_score` do not count.
    """
    classes = classify_boxes(overlaps, lambda description: "object")
    matches = match_boxes(overlaps, classes, ignored_boxes(overlaps.truth.area))[_threshold_index(iou)]
    eligible = np.flatnonzero(overlaps.scores >= min_score)
    truth, predicted = overlaps.truth.descriptions, overlaps.predicted.descriptions
    missed = np.setdiff1d(np.arange(len(truth)), matches[eligible]).tolist()
    pairs: list[tuple[str | None, str | None]] = [
        (truth[matches[p]] if matches[p] >= 0 else None, predicted[p]) for p in eligible.tolist()
    ]
    return pairs + [(truth[t], None) for t in missed]


def _threshold_index(iou: float) -> int:
    """Row of a threshold in `Counts.matched`; `iou` is one of IOU_THRESHOLDS."""
    (index,) = np.flatnonzero(np.isclose(IOU_THRESHOLDS, iou))
    return int(index)


def headline_scores(counts: Counts, iou: float) -> Headline:
    """Precision, recall and F1 over all images at one IoU threshold, one of IOU_THRESHOLDS."""
    row = _threshold_index(iou)
    scores = f_scores(counts.matched[row].sum(), counts.predicted.sum(), counts.truth.sum())
    return Headline(iou, *(defined_score(value) for value in scores))


def f_scores(matched: Any, predicted: Any, truth: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of counts of any common shape.

    NaN where nothing is true, because then there is nothing to be right about; and for the precision of no prediction.
    """
    matched, predicted, truth = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (matched, predicted, truth)))

    def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
        return np.where((truth == 0) | (under == 0), np.nan, over / np.where(under == 0, 1.0, under))

    return ratio(matched, predicted), ratio(matched, truth), ratio(2 * matched, predicted + truth)


def summarise(counts: Counts, weights: np.ndarray | None = None) -> dict[str, Any]:
    """`{precision,recall,f1}@{0.50,0.75,0.50:0.95}` over all images (micro).

    weights: [B, I] how often each image counts; then every value is [B], with NaN where there is no score. F1@0.50:0.95
    is the mean of ten F1.
    """
    w = np.ones((1, len(counts.truth))) if weights is None else weights
    # In float64, in which counts are exact: numpy multiplies matrices of integers without BLAS, many times slower.
    matched, predicted, truth = (np.asarray(a, dtype=float) for a in (counts.matched, counts.predicted, counts.truth))
    totals = (w @ matched.T, (w @ predicted)[:, None], (w @ truth)[:, None])
    values: dict[str, Any] = {}
    for name, score in zip(("precision", "recall", "f1"), f_scores(*totals), strict=True):
        values |= {f"{name}@0.50": score[:, 0], f"{name}@0.75": score[:, 5], f"{name}@0.50:0.95": score.mean(1)}
    return values if weights is not None else {k: defined_score(v[0]) for k, v in values.items()}


def bootstrap(
    counts: Mapping[str, Counts], *, resamples: int, seed: int, level: float = 0.95
) -> dict[str, dict[str, list[float] | None]]:
    """Percentile intervals [low, high] of every value of `summarise`, resampling images with replacement.

    Images, not boxes, because boxes of one photo stand or fall together. No intervals for 0 resamples. Resamples over
    which a value has no score do not count; where none has one, the interval is None.

    Args:
        counts: several countings of the same images; each is resampled alike.
        resamples, seed: how many resamples, and the seed they follow from.
        level: confidence of the intervals, 0 to 1.
    """
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in counts}
    images = len(next(iter(counts.values())).truth)
    for weights in _draw_weights(images, resamples, seed):
        for name, mode_counts in counts.items():
            parts[name].append(summarise(mode_counts, weights))
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {name: _join_intervals(drawn, tails) for name, drawn in parts.items()}


def _join_intervals(parts: Sequence[Mapping[str, np.ndarray]], tails: Sequence[float]) -> dict[str, list[float] | None]:
    """The interval of each value over all blocks of resamples."""
    return {key: _interval(np.concatenate([part[key] for part in parts]), tails) for key in (parts[0] if parts else ())}


def _draw_weights(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in each resample: blocks [B, I] float64, of at most _RESAMPLES_AT_ONCE."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=size).astype(float)


def _interval(values: np.ndarray, tails: Sequence[float]) -> list[float] | None:
    defined = values[~np.isnan(values)]
    return [float(x) for x in np.percentile(defined, tails)] if len(defined) else None


def count_absent_classes(overlaps: Overlaps, class_of: ClassOf, min_score: float = 0.0) -> Counter[Any]:
    """Count the predictions of each class of which the ground truth has no object.

    COCO averages over the classes of the ground truth, so that these predictions, all wrong, cost no average precision.
    Predictions with a score below `min_score` do not count.
    """
    present = {class_of(text) for text in set(overlaps.truth.descriptions)}
    eligible = (overlaps.scores >= min_score).tolist()
    texts = Counter(text for text, counts in zip(overlaps.predicted.descriptions, eligible, strict=True) if counts)
    absent: Counter[Any] = Counter()
    for text, count in texts.items():
        if (name := class_of(text)) not in present:
            absent[name] += count
    return absent


def score_source(predictions: Sequence[Prediction]) -> str | None:
    """The one source of all scores, None where no prediction has any.

    Raises DataError when sources are mixed or an object of a scored file has no score.
    """
    with_objects = [p for p in predictions if p.objects]
    sources = {p.score_source for p in with_objects}
    if len(sources) > 1:
        names = ", ".join(sorted(str(s) for s in sources))
        raise DataError(f"predictions mix scores from {names}: not comparable; predict all images in one way")
    source = sources.pop() if sources else None
    for prediction in with_objects:
        scored = len(prediction.scores) == len(prediction.objects) and None not in prediction.scores
        if source is not None and not scored:
            raise DataError(f"{prediction.image}: an object without score though {source} is named; predict again")
    return source
