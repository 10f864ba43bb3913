"""Two lists of objects in one photo become one. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from bbu.schema import BBUObject, Box

Scored = tuple[Sequence[BBUObject], Sequence[float]]
SAME_IOU = 0.5
"""Overlap from which two boxes are taken to mean the same part."""


def merge(first: Scored, second: Scored) -> tuple[tuple[BBUObject, ...], tuple[float, ...]]:
    """All of `first`, in its order, then what `second` has besides, in the order of its scores.

    An object of `first` that `second` saw too keeps its own box and label, and has a score as of two independent
    witnesses: 1 - (1 - a)(1 - b). Each object of `second` confirms one of `first`, the one it overlaps most.
    """
    objects, scores = list(first[0]), list(first[1])
    confirmed: set[int] = set()
    rest: list[tuple[BBUObject, float]] = []
    for item, score in sorted(zip(*second, strict=True), key=lambda pair: -pair[1]):
        overlaps = [(iou(item.bbox_2d, own.bbox_2d), i) for i, own in enumerate(objects) if i not in confirmed]
        best, index = max(overlaps, default=(0.0, -1))
        if best >= SAME_IOU:
            confirmed.add(index)
            scores[index] = 1 - (1 - scores[index]) * (1 - score)
        else:
            rest.append((item, score))
    return tuple(objects + [item for item, _ in rest]), tuple(scores + [score for _, score in rest])


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
