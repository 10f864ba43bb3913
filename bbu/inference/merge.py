"""Merges two lists of objects in one photo into one. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from bbu.boxes import pairwise_iou_and_giou
from bbu.schema import BBUObject

ScoredObjects = tuple[Sequence[BBUObject], Sequence[float]]
"""Objects of one photo, and the score of each."""
_SAME_IOU = 0.5
"""IoU from which two boxes count as the same part: the loosest threshold of COCO's metrics."""


def merge_objects(first: ScoredObjects, second: ScoredObjects) -> tuple[tuple[BBUObject, ...], tuple[float, ...]]:
    """Take all of `first`, in its order, then what only `second` has, in the order of its scores.

    An object of `first` that `second` has too keeps its own box and label, and gets the score of two independent
    witnesses: 1 - (1 - a)(1 - b). Each object of `second` confirms one of `first`, the one that it overlaps most.
    """
    objects, scores = list(first[0]), list(first[1])
    candidates = sorted(zip(*second, strict=True), key=lambda pair: -pair[1])
    overlaps = _pairwise_iou([item for item, _ in candidates], objects)
    confirmed: set[int] = set()
    rest: list[tuple[BBUObject, float]] = []
    for (item, score), row in zip(candidates, overlaps, strict=True):
        iou, index = max(((iou, i) for i, iou in enumerate(row) if i not in confirmed), default=(0.0, -1))
        if iou >= _SAME_IOU:
            confirmed.add(index)
            scores[index] = 1 - (1 - scores[index]) * (1 - score)
        else:
            rest.append((item, score))
    return tuple(objects + [item for item, _ in rest]), tuple(scores + [score for _, score in rest])


def _pairwise_iou(first: Sequence[BBUObject], second: Sequence[BBUObject]) -> list[list[float]]:
    """IoU of each object of `first` with each of `second`, a row for each of `first`."""
    if not first or not second:
        return [[] for _ in first]
    iou, _ = pairwise_iou_and_giou([item.bbox_2d for item in first], [item.bbox_2d for item in second])
    return iou.tolist()
