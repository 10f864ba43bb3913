"""What becomes of objects that are detected twice: by two queries of the head, or by head and answer. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bbu.boxes import pairwise_iou_and_giou
from bbu.schema import BBUObject

ScoredObjects = tuple[Sequence[BBUObject], Sequence[float]]
"""Objects of one photo, and the score of each."""
SAME_IOU = 0.5
"""IoU from which two boxes count as the same part: the loosest threshold of COCO's metrics."""


def select_distinct(corners: NDArray[np.floating], scores: NDArray[np.floating]) -> list[int]:
    """Select boxes, best first, and of those that mark the same part the best alone (greedy NMS, any label).

    Args:
        corners: boxes [Q, 4] in the corner form.
        scores: [Q].

    Returns:
        Indices of the selected boxes.
    """
    order = np.argsort(-scores, kind="stable")
    is_same = pairwise_iou_and_giou(corners[order], corners[order])[0] >= SAME_IOU
    places: list[int] = []
    for place in range(len(order)):
        if not is_same[place, places].any():
            places.append(place)
    return order[places].tolist()


def overlaps_any(corners: NDArray[np.floating], others: Sequence[BBUObject]) -> NDArray[np.bool_]:
    """Whether each box [Q, 4] marks the same part as any of some objects: [Q]."""
    if not others:
        return np.zeros(len(corners), dtype=bool)
    iou, _ = pairwise_iou_and_giou(corners, np.array([item.bbox_2d for item in others], dtype=float))
    return (iou >= SAME_IOU).any(axis=1)


def confirm_finds(
    finds: ScoredObjects, answer: ScoredObjects, threshold: float
) -> tuple[tuple[BBUObject, ...], tuple[float, ...]]:
    """Take the head's finds that reach `threshold`, and weaker ones that the answer confirms; best first.

    The answer confirms the find that it overlaps most, of those with its label, and adds none of its own. A find that
    is confirmed gets the score of two independent witnesses: 1 - (1 - a)(1 - b).
    """
    objects, scores = finds
    witness: dict[int, float] = {}
    for item, score in sorted(zip(*answer, strict=True), key=lambda pair: -pair[1]):
        alike = [i for i, find in enumerate(objects) if find.desc == item.desc and i not in witness]
        if alike:
            iou, _ = pairwise_iou_and_giou([item.bbox_2d], [objects[i].bbox_2d for i in alike])
            best = int(iou[0].argmax())
            if iou[0, best] >= SAME_IOU:
                witness[alike[best]] = score
    taken = [
        (find, 1 - (1 - score) * (1 - witness.get(i, 0.0)))
        for i, (find, score) in enumerate(zip(objects, scores, strict=True))
        if score >= threshold or i in witness
    ]
    taken.sort(key=lambda pair: -pair[1])
    return tuple(find for find, _ in taken), tuple(score for _, score in taken)
