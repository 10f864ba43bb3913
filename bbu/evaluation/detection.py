"""Detection scores on pycocotools' matches.

Generated answers carry no scores, so the headline is precision, recall and F1 at IoU 0.5, 0.75 and the mean over
0.5:0.95, with and without the class. Where a named source gave scores, COCO's AP and AR are added. Every image of
the ground truth counts, whatever became of its prediction: a failed image is an image where all was missed.

Over no true object there is no score, and a precision needs predictions: such values are NaN in arrays and None in
results, never a perfect 1 or a 0.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bbu.errors import DataError
from bbu.evaluation.metrics import Headline, defined_score
from bbu.evaluation.predictions import Prediction
from bbu.labels import LEVELS, LabelScheme, Level
from bbu.schema import BBUObject, View

_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AGREEING_LEVELS: dict[str, tuple[Level, ...]] = {
    "class_agnostic": (), "type": LEVELS[:1], "property": LEVELS[:2], "class_aware": LEVELS,
}  # fmt: skip
"""The ways to score boxes by name: which levels of two labels must agree before their boxes are compared."""
ClassOf = Callable[[str], Any]
"""Gives the class of a description. Boxes are matched within a class; classes can be compared and sorted."""

_COCO_LIMITS = (1, 10, 100)
"""Most boxes of an image that COCO's AR1, AR10 and AR100 count; its AP counts as many as AR100."""


@dataclass(frozen=True)
class Pairing:
    """One image: its truth, its predictions, and for each IoU threshold who was matched with whom."""

    truth: tuple[BBUObject, ...]
    predicted: tuple[BBUObject, ...]
    scores: tuple[float | None, ...] = ()


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


def drop_uncertain(pair: Pairing, min_score: float) -> Pairing:
    """Drop the predictions that have a score below `min_score`."""
    if not pair.scores:
        return pair
    certain = [(item, s) for item, s in zip(pair.predicted, pair.scores, strict=True) if s is None or s >= min_score]
    return Pairing(pair.truth, tuple(item for item, _ in certain), tuple(s for _, s in certain))


def class_by_levels(scheme: LabelScheme, levels: Sequence[Level]) -> ClassOf:
    """Make the texts of some levels of its label the class of a description; no levels make all boxes one class."""

    def class_of(description: str) -> tuple[str, ...]:
        label = scheme.parse_description(description)
        return tuple(label.text_of(level) for level in levels)

    return class_of


def _run_coco(pairs: Sequence[Pairing], class_of: ClassOf, max_detections: Sequence[int]) -> COCOeval:
    """pycocotools' per-image matching, evaluated, of boxes of the same class.

    Ids start at 1, because COCOeval reads a match with id 0 as no match. Class-agnostic is one common category
    rather than `useCats=0`, which would reorder equal scores by category. Equal scores keep the answer's order.
    """
    classes = sorted({class_of(o.desc) for p in pairs for o in (*p.truth, *p.predicted)})
    category = {name: i for i, name in enumerate(classes, 1)}
    frame = {
        "images": [{"id": i} for i in range(1, len(pairs) + 1)],
        "categories": [{"id": i, "name": str(name)} for name, i in category.items()],
    }
    truth, predicted = [], []
    for image, pair in enumerate(pairs, 1):
        truth += [_annotation(o, image, category[class_of(o.desc)]) for o in pair.truth]
        scores = pair.scores or (None,) * len(pair.predicted)
        for item, score in zip(pair.predicted, scores, strict=True):
            annotation = _annotation(item, image, category[class_of(item.desc)])
            predicted.append(annotation | {"score": 1.0 if score is None else float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_coco(frame, truth), _coco(frame, predicted), "bbox")
        evaluator.params.iouThrs = _IOU_THRESHOLDS
        evaluator.params.maxDets = list(max_detections)
        evaluator.evaluate()
    return evaluator


def _annotation(item: BBUObject, image: int, category: int) -> dict[str, Any]:
    x1, y1, x2, y2 = item.bbox_2d
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}


def _coco(frame: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    dataset: Any = frame | {"annotations": [a | {"id": i} for i, a in enumerate(annotations, 1)]}
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _all_areas(evaluator: COCOeval) -> list[Any]:
    every = list(evaluator.params.areaRng[0])
    return [e for e in evaluator.evalImgs if e is not None and list(e["aRng"]) == every]


def most_boxes(pairs: Sequence[Pairing]) -> int:
    """The most boxes of one image, true or predicted; at least 1."""
    return max((len(boxes) for pair in pairs for boxes in (pair.truth, pair.predicted)), default=0) or 1


def count_matches(pairs: Sequence[Pairing], class_of: ClassOf) -> Counts:
    """Count the matched, predicted and true boxes of each image; only boxes of the same class match."""
    matched = np.zeros((len(_IOU_THRESHOLDS), len(pairs)), dtype=np.int64)
    for entry in _all_areas(_run_coco(pairs, class_of, [most_boxes(pairs)])):
        matched[:, entry["image_id"] - 1] += (entry["dtMatches"] > 0).sum(axis=1)
    predicted = np.array([len(p.predicted) for p in pairs], dtype=np.int64)
    return Counts(matched, predicted, np.array([len(p.truth) for p in pairs], dtype=np.int64))


def matched_pairs(pairs: Sequence[Pairing], iou: float = 0.5) -> list[tuple[str | None, str | None]]:
    """(true desc, predicted desc) of boxes matched at IoU `iou` without regard to labels.

    A missed object has None as its second, a spurious prediction None as its first.
    """
    evaluator = _run_coco(pairs, lambda description: "object", [most_boxes(pairs)])
    truth = [o.desc for p in pairs for o in p.truth]
    predicted = [o.desc for p in pairs for o in p.predicted]
    row = _threshold_index(iou)
    result: list[tuple[str | None, str | None]] = []
    for entry in _all_areas(evaluator):
        for detection, other in zip(entry["dtIds"], entry["dtMatches"][row], strict=True):
            result.append((truth[int(other) - 1] if other else None, predicted[detection - 1]))
        missed = [g for g, d in zip(entry["gtIds"], entry["gtMatches"][row], strict=True) if not d]
        result += [(truth[g - 1], None) for g in missed]
    return result


def _threshold_index(iou: float) -> int:
    """Row of a threshold in `Counts.matched`; `iou` is one of _IOU_THRESHOLDS."""
    (index,) = np.flatnonzero(np.isclose(_IOU_THRESHOLDS, iou))
    return int(index)


def headline_scores(counts: Counts, iou: float) -> Headline:
    """Precision, recall and F1 over all images at one IoU threshold, one of _IOU_THRESHOLDS."""
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
    w = np.ones((1, len(counts.truth)), dtype=np.int64) if weights is None else weights
    totals = (w @ counts.matched.T, (w @ counts.predicted)[:, None], (w @ counts.truth)[:, None])
    values: dict[str, Any] = {}
    for name, score in zip(("precision", "recall", "f1"), f_scores(*totals), strict=True):
        values |= {f"{name}@0.50": score[:, 0], f"{name}@0.75": score[:, 5], f"{name}@0.50:0.95": score.mean(1)}
    return values if weights is not None else {k: defined_score(v[0]) for k, v in values.items()}


def bootstrap(counts: Counts, *, resamples: int, seed: int, level: float = 0.95) -> dict[str, list[float] | None]:
    """Percentile intervals [low, high] of every value of `summarise`, resampling images with replacement.

    Images, not boxes, because boxes of one photo stand or fall together. No intervals for 0 resamples. Resamples over
    which a value has no score do not count; where none has one, the interval is None.
    """
    if resamples == 0:
        return {}
    images = len(counts.truth)
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {name: _interval(values, tails) for name, values in summarise(counts, weights).items()}


def _interval(values: np.ndarray, tails: Sequence[float]) -> list[float] | None:
    defined = values[~np.isnan(values)]
    return [float(x) for x in np.percentile(defined, tails)] if len(defined) else None


def average_precision(pairs: Sequence[Pairing], class_of: ClassOf) -> dict[str, float]:
    """COCO's twelve numbers (`pycocotools.COCOeval.summarize`); -1 where there is no ground truth.

    All boxes count, also of an image with more than COCO's 100. Classes that the ground truth lacks do not count: see
    `count_absent_classes`.
    """
    limits = [*_COCO_LIMITS, max(most_boxes(pairs), _COCO_LIMITS[-1])]
    evaluator = _run_coco(pairs, class_of, limits)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    # Thresholds, recalls, classes, areas, limits; recall without the second. summarize() itself would look for the
    # limit 100 and take its numbers from there.
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    values = {"AP": precision[:, :, :, 0, -1], "AP50": precision[0, :, :, 0, -1], "AP75": precision[5, :, :, 0, -1]}
    values |= {f"AP{size}": precision[:, :, :, i, -1] for i, size in enumerate("sml", 1)}
    values |= {f"AR{limit}": recall[:, :, 0, i] for i, limit in enumerate(_COCO_LIMITS)}
    values |= {f"AR{size}": recall[:, :, i, -1] for i, size in enumerate("sml", 1)}
    return {name: _mean_of_defined(entries) for name, entries in values.items()}


def _mean_of_defined(entries: np.ndarray) -> float:
    """The mean without the -1 that pycocotools writes for a class without ground truth; -1 where all are."""
    defined = entries[entries > -1]
    return float(defined.mean()) if defined.size else -1.0


def count_absent_classes(pairs: Sequence[Pairing], class_of: ClassOf) -> Counter[Any]:
    """Count the predictions of each class of which the ground truth has no object.

    COCO averages over the classes of the ground truth, so that these predictions, all wrong, cost no average precision.
    """
    present = {class_of(item.desc) for pair in pairs for item in pair.truth}
    predictions = Counter(class_of(item.desc) for pair in pairs for item in pair.predicted)
    return Counter({name: count for name, count in predictions.items() if name not in present})


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
