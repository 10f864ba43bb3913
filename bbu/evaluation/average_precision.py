"""COCO's average precision and recall, the twelve numbers of `pycocotools.COCOeval.summarize`.

Shapes: T IoU thresholds, R recalls, K classes, D predicted boxes.
"""

from __future__ import annotations

import numpy as np

from bbu.evaluation.matching import (
    IOU_THRESHOLDS,
    Classes,
    ClassOf,
    Overlaps,
    classify_boxes,
    match_boxes,
    rank_in_group,
)

_RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads the precision."""
_AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
"""COCO's sizes of boxes: least and most square pixels; the first is all."""
_LIMITS = (1, 10, 100)
"""Most boxes of an image and class that AR1, AR10 and AR100 count."""


def average_precision(overlaps: Overlaps, class_of: ClassOf) -> dict[str, float]:
    """COCO's twelve numbers; -1 where there is no ground truth.

    All boxes count, also of an image with more than COCO's 100. Classes that the ground truth lacks do not count: see
    `detection.count_absent_classes`.
    """
    classes = classify_boxes(overlaps, class_of)
    rank = rank_in_group(overlaps.predicted.photo * len(classes.names) + classes.predicted, overlaps.scores)
    curves = {size: _curves(overlaps, classes, size, rank) for size in _AREAS}
    precision, recall = curves[""]
    values = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
    values |= {f"AP{size}": curves[size][0] for size in "sml"}
    values |= {f"AR{limit}": recall[i] for i, limit in enumerate(_LIMITS)}
    values |= {f"AR{size}": curves[size][1][-1] for size in "sml"}
    return {name: _mean_of_defined(entries) for name, entries in values.items()}


def ignored_boxes(area: np.ndarray, size: str = "") -> np.ndarray:
    """Whether boxes of some areas, in square pixels, are outside one of COCO's sizes: `s`, `m`, `l`, or all sizes."""
    low, high = _AREAS[size]
    return (area < low) | (area > high)


def _curves(overlaps: Overlaps, classes: Classes, size: str, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of each class over the boxes of one size.

    Args:
        rank: [D] boxes of the same image and class with a higher score than each.

    Returns:
        [T, R, K] precision at _RECALLS, and [M, T, K] recall at each of _LIMITS and, as the last, without a limit; -1
        for classes without a true box.
    """
    ignored = ignored_boxes(overlaps.truth.area, size)
    matches = match_boxes(overlaps, classes, ignored)
    # A match with an ignored box, or none of a box that is itself outside the range, is neither right nor wrong.
    outside = np.where(matches >= 0, np.append(ignored, False)[matches], ignored_boxes(overlaps.predicted.area, size))
    right, wrong = (matches >= 0) & ~outside, (matches < 0) & ~outside
    order = np.lexsort((-overlaps.scores, classes.predicted))
    ends = np.searchsorted(classes.predicted[order], np.arange(len(classes.names) + 1))
    positives = np.bincount(classes.truth[~ignored], minlength=len(classes.names))
    precision = np.full((len(IOU_THRESHOLDS), len(_RECALLS), len(classes.names)), -1.0)
    recall = np.full((len(_LIMITS) + 1, len(IOU_THRESHOLDS), len(classes.names)), -1.0)
    for k in np.flatnonzero(positives):
        rows = order[ends[k] : ends[k + 1]]
        precision[:, :, k] = _interpolate(right[:, rows], wrong[:, rows], positives[k])
        for m, limit in enumerate([*_LIMITS, len(rank)]):
            recall[m, :, k] = right[:, rows[rank[rows] < limit]].sum(1) / positives[k]
    return precision, recall


def _interpolate(right: np.ndarray, wrong: np.ndarray, positives: int) -> np.ndarray:
    """The best precision at each of _RECALLS or beyond it: [T, R]; 0 at recalls that are not reached.

    Args:
        right, wrong: [T, D] bool, boxes of one class by descending score.
        positives: number of true boxes of the class.
    """
    true_positives, false_positives = right.cumsum(1).astype(float), wrong.cumsum(1).astype(float)
    precision = true_positives / (false_positives + true_positives + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.append(best, np.zeros((len(best), 1)), axis=1)
    index = [np.searchsorted(recall, _RECALLS) for recall in true_positives / positives]
    return np.take_along_axis(best, np.stack(index), axis=1)


def _mean_of_defined(entries: np.ndarray) -> float:
    """The mean without the -1 of classes without ground truth; -1 where all are."""
    defined = entries[entries > -1]
    return float(defined.mean()) if defined.size else -1.0
