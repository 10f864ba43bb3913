"""Detection scores on pycocotools' matches.

Generated answers carry no scores, so the headline is precision, recall and F1 at IoU 0.5, 0.75 and the mean over
0.5:0.95, with and without the class. Where a named source gave scores, COCO's AP and AR are added. Every image of
the ground truth counts, whatever became of its prediction: a failed image is an image where all was missed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bbu.errors import DataError
from bbu.evaluation.metrics import Headline
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

_MORE_THAN_ANY_IMAGE = 10_000
_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


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

    An image without prediction is kept with none. Raises DataError for an image predicted twice, predicted but
    not in the ground truth, or predicted at another size (its boxes would live in other pixels).
    """
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


def count_matches(pairs: Sequence[Pairing], class_of: ClassOf) -> Counts:
    """Count the matched, predicted and true boxes of each image; only boxes of the same class match."""
    matched = np.zeros((len(_IOU_THRESHOLDS), len(pairs)), dtype=np.int64)
    for entry in _all_areas(_run_coco(pairs, class_of, [_MORE_THAN_ANY_IMAGE])):
        matched[:, entry["image_id"] - 1] += (entry["dtMatches"] > 0).sum(axis=1)
    predicted = np.array([len(p.predicted) for p in pairs], dtype=np.int64)
    return Counts(matched, predicted, np.array([len(p.truth) for p in pairs], dtype=np.int64))


def matched_pairs(pairs: Sequence[Pairing], iou: float = 0.5) -> list[tuple[str | None, str | None]]:
    """(true desc, predicted desc) of boxes matched at IoU `iou` without regard to labels.

    A missed object has None as its second, a spurious prediction None as its first.
    """
    evaluator = _run_coco(pairs, lambda description: "object", [_MORE_THAN_ANY_IMAGE])
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
    return Headline(iou, *(float(value) for value in scores))


def f_scores(matched: Any, predicted: Any, truth: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of counts of any common shape.

    Nothing predicted where nothing is true is perfect (1); otherwise an empty denominator gives 0.
    """
    matched, predicted, truth = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (matched, predicted, truth)))
    empty = (predicted == 0) & (truth == 0)

    def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
        return np.where(empty, 1.0, over / np.where(under == 0, 1.0, under))

    return ratio(matched, predicted), ratio(matched, truth), ratio(2 * matched, predicted + truth)


def summarise(counts: Counts, weights: np.ndarray | None = None) -> dict[str, Any]:
    """`{precision,recall,f1}@{0.50,0.75,0.50:0.95}` over all images (micro).

    weights: [B, I] how often each image counts; then every value is [B]. F1@0.50:0.95 is the mean of ten F1.
    """
    w = np.ones((1, len(counts.truth)), dtype=np.int64) if weights is None else weights
    totals = (w @ counts.matched.T, (w @ counts.predicted)[:, None], (w @ counts.truth)[:, None])
    values: dict[str, Any] = {}
    for name, score in zip(("precision", "recall", "f1"), f_scores(*totals), strict=True):
        values |= {f"{name}@0.50": score[:, 0], f"{name}@0.75": score[:, 5], f"{name}@0.50:0.95": score.mean(1)}
    return values if weights is not None else {k: float(v[0]) for k, v in values.items()}


def bootstrap(counts: Counts, *, resamples: int, seed: int, level: float = 0.95) -> dict[str, list[float]]:
    """Percentile intervals [low, high] of every value of `summarise`, resampling images with replacement.

    Images, not boxes, because boxes of one photo stand or fall together. No intervals for 0 resamples.
    """
    if resamples == 0:
        return {}
    images = len(counts.truth)
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {k: [float(x) for x in np.percentile(v, tails)] for k, v in summarise(counts, weights).items()}


def average_precision(pairs: Sequence[Pairing], class_of: ClassOf) -> dict[str, float]:
    """COCO's twelve numbers (`pycocotools.COCOeval.summarize`); -1 where there is no ground truth."""
    evaluator = _run_coco(pairs, class_of, [1, 10, 100])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
        evaluator.summarize()
    return {name: float(value) for name, value in zip(_AP_NAMES, evaluator.stats, strict=True)}


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
