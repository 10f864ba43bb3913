"""Matches predicted with true boxes by COCO's rule, for all photos at once.

The rule (`COCOeval.evaluateImg` of pycocotools): the predictions of a photo choose in the order of their scores. Each
takes, of the true boxes that are still free and overlap it by at least the threshold, the one with the highest IoU; of
equal ones the last. Boxes outside an area range are ignored: they are chosen only where no other is left.

Shapes: T IoU thresholds, N true boxes and D predicted boxes of all photos, P pairs of them that overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bbu.schema import BBUObject

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ClassOf = Callable[[str], Any]
"""Gives the class of a description. Boxes are matched within a class; classes can be compared and sorted."""

_PAIRS_AT_ONCE = 2**20
"""Pairs of boxes whose IoU is computed at once: some 100 MB, however crowded the photos are."""


@dataclass(frozen=True)
class Pairing:
    """One image: its truth and its predictions."""

    truth: tuple[BBUObject, ...]
    predicted: tuple[BBUObject, ...]
    scores: tuple[float | None, ...] = ()
    """one for each prediction; empty where there are none"""


@dataclass(frozen=True)
class Boxes:
    """The true or the predicted boxes of all photos, one photo after the other."""

    photo: np.ndarray
    """[N] int64: which photo each lies in, in ascending order"""
    xywh: np.ndarray
    """[4, N]: left edge, top edge, width and height, as COCO has boxes"""
    descriptions: list[str]

    @property
    def area(self) -> np.ndarray:
        """[N], in square pixels."""
        return self.xywh[2] * self.xywh[3]


@dataclass(frozen=True)
class _Pairs:
    """P pairs of overlapping boxes, sorted by `turn`, then prediction, then best true box first."""

    predicted: np.ndarray
    """[P] int64: index of the predicted box"""
    truth: np.ndarray
    """[P] int64: index of the true box"""
    iou: np.ndarray
    """[P]: at least the lowest of IOU_THRESHOLDS"""
    turn: np.ndarray
    """[P] int64: how many predictions of the photo choose before this one"""

    def take(self, index: np.ndarray) -> _Pairs:
        return _Pairs(self.predicted[index], self.truth[index], self.iou[index], self.turn[index])


@dataclass(frozen=True)
class Overlaps:
    """All boxes of a data set and how they overlap, whatever their labels."""

    photos: int
    """number of photos, those without boxes included"""
    truth: Boxes
    predicted: Boxes
    scores: np.ndarray
    """[D]: 1 for predictions without a score"""
    pairs: _Pairs


@dataclass(frozen=True)
class Classes:
    """The class of each box."""

    names: list[Any]
    """K classes of true or predicted boxes, sorted"""
    truth: np.ndarray
    """[N] int64: index of a name"""
    predicted: np.ndarray
    """[D] int64: index of a name"""


def find_overlaps(pairings: Sequence[Pairing]) -> Overlaps:
    """Find the pairs of a true and a predicted box of a photo that overlap enough for any of IOU_THRESHOLDS."""
    truth, predicted = _boxes([p.truth for p in pairings]), _boxes([p.predicted for p in pairings])
    scores = [1.0 if s is None else s for p in pairings for s in p.scores or (None,) * len(p.predicted)]
    score = np.array(scores, dtype=float)
    return Overlaps(len(pairings), truth, predicted, score, _find_pairs(len(pairings), truth, predicted, score))


def classify_boxes(overlaps: Overlaps, class_of: ClassOf) -> Classes:
    """Give each box its class; each different description is read once."""
    sides = overlaps.truth.descriptions, overlaps.predicted.descriptions
    class_by_description = {text: class_of(text) for text in {*sides[0], *sides[1]}}
    names = sorted(set(class_by_description.values()))
    index = {name: i for i, name in enumerate(names)}
    code = {text: index[name] for text, name in class_by_description.items()}
    return Classes(names, *(np.array([code[text] for text in side], dtype=np.int64) for side in sides))


def match_boxes(overlaps: Overlaps, classes: Classes, ignored: np.ndarray) -> np.ndarray:
    """Match predicted with true boxes of the same class at each of IOU_THRESHOLDS.

    A match depends on the predictions with higher scores alone: without those below some score it is the same.

    Args:
        ignored: [N] bool, true boxes that are chosen last.

    Returns:
        [T, D] int64: index of the true box that each prediction takes; -1 for none.
    """
    pairs = overlaps.pairs
    pairs = pairs.take(classes.predicted[pairs.predicted] == classes.truth[pairs.truth])
    # lexsort is stable: among boxes that are equally ignored the best one stays first.
    pairs = pairs.take(np.lexsort((ignored[pairs.truth], pairs.predicted, pairs.turn)))
    matches = np.full((len(IOU_THRESHOLDS), len(overlaps.scores)), -1)
    free = np.ones((len(IOU_THRESHOLDS), len(ignored)), dtype=bool)
    # In each turn at most one prediction of a photo chooses, so that no two want the same box.
    for start, stop in _runs(pairs.turn):
        predicted, truth = pairs.predicted[start:stop], pairs.truth[start:stop]
        can_match = free[:, truth] & (pairs.iou[start:stop] >= IOU_THRESHOLDS[:, None])
        firsts = _run_starts(predicted)
        place = np.where(can_match, np.arange(stop - start), stop - start)
        best = np.minimum.reduceat(place, firsts, axis=1)
        threshold, row = np.nonzero(best < stop - start)
        chosen = truth[best[threshold, row]]
        matches[threshold, predicted[firsts][row]] = chosen
        free[threshold, chosen] = False
    return matches


def rank_in_group(group: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How many members of its group come before each box by score: [D] int64; equal scores keep their order."""
    order = np.lexsort((-scores, group))
    first = np.searchsorted(group[order], group[order])
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - first
    return rank


def _boxes(photos: Sequence[Sequence[BBUObject]]) -> Boxes:
    corners = np.array([item.bbox_2d for objects in photos for item in objects], dtype=float).reshape(-1, 4).T
    photo = np.repeat(np.arange(len(photos)), [len(objects) for objects in photos])
    xywh = np.concatenate([corners[:2], corners[2:] - corners[:2]])
    return Boxes(photo, xywh, [item.desc for objects in photos for item in objects])


def _find_pairs(photos: int, truth: Boxes, predicted: Boxes, scores: np.ndarray) -> _Pairs:
    in_photo = np.bincount(truth.photo, minlength=photos)
    partners = in_photo[predicted.photo]  # [D] true boxes in the photo of each prediction
    first = (np.cumsum(in_photo) - in_photo)[predicted.photo]
    blocks = _runs(np.cumsum(partners) // _PAIRS_AT_ONCE)
    parts = [_overlapping(truth, predicted, np.arange(*block), first, partners) for block in blocks]
    row, column, iou = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else np.zeros((3, 0), int)
    candidates = np.unique(row)
    turn = np.zeros(len(scores), dtype=np.int64)
    turn[candidates] = rank_in_group(predicted.photo[candidates], scores[candidates])
    pairs = _Pairs(row, column, iou, turn[row])
    return pairs.take(np.lexsort((-column, -iou, row, pairs.turn)))


def _overlapping(
    truth: Boxes, predicted: Boxes, rows: np.ndarray, first: np.ndarray, partners: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare some predictions with all true boxes of their photos.

    Args:
        rows: the predictions.
        first: [D] index of the first true box in the photo of each prediction.
        partners: [D] number of true boxes there.

    Returns:
        Three arrays, for each pair that overlaps enough: prediction, true box, IoU.
    """
    counts = partners[rows]
    row = np.repeat(rows, counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    column = first[row] + np.arange(len(row)) - before
    iou = _coco_iou(predicted.xywh[:, row], truth.xywh[:, column])
    enough = iou >= IOU_THRESHOLDS[0]
    return row[enough], column[enough], iou[enough]


def _coco_iou(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU of boxes [4, P], pair by pair, in the operations and the order of pycocotools (`bbIou` of maskApi.c).

    Rounded otherwise, an IoU that lies exactly at a threshold would fall on the other side.
    """
    (left, top, width, height), (true_left, true_top, true_width, true_height) = predicted, truth
    shared_width = np.minimum(width + left, true_width + true_left) - np.maximum(left, true_left)
    shared_height = np.minimum(height + top, true_height + true_top) - np.maximum(top, true_top)
    overlap = (shared_width > 0) & (shared_height > 0)
    shared = shared_width * shared_height
    union = width * height + true_width * true_height - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=overlap)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal values."""
    starts = _run_starts(values).tolist()
    return zip(starts, [*starts[1:], len(values)], strict=True) if starts else iter(())


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.zeros(0, dtype=np.int64)
