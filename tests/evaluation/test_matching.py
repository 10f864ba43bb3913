"""Matching: whatever the photos, each prediction takes the box that pycocotools gives it."""

from __future__ import annotations

import numpy as np
import pytest

from bbu.evaluation import matching
from bbu.evaluation.average_precision import ignored_boxes
from bbu.evaluation.matching import ClassOf, Pairing, classify_boxes, find_overlaps, match_boxes
from bbu.schema import BBUObject
from tests.evaluation.coco import random_photos, run_coco


def one_class(description: str) -> str:
    return "object"


def matches_of_coco(pairings: list[Pairing], class_of: ClassOf) -> np.ndarray:
    """[4 sizes of boxes, T thresholds, D predictions]: index of the true box of each; -1 for none."""
    evaluator = run_coco(pairings, class_of, [1, 10, 100, 1000])
    predictions = sum(len(p.predicted) for p in pairings)
    matches = np.full((4, len(evaluator.params.iouThrs), predictions), -1)
    sizes = [list(area) for area in evaluator.params.areaRng]
    for entry in filter(None, evaluator.evalImgs):
        ids = np.array(entry["dtIds"], dtype=int) - 1
        matches[sizes.index(list(entry["aRng"]))][:, ids] = entry["dtMatches"].astype(int) - 1
    return matches


@pytest.mark.parametrize("class_of", [str, one_class])
@pytest.mark.parametrize("seed", range(12))
def test_every_match_at_every_threshold_and_size_is_that_of_pycocotools(seed: int, class_of: ClassOf):
    pairings = random_photos(seed)
    overlaps = find_overlaps(pairings)
    classes = classify_boxes(overlaps, class_of)
    ours = [match_boxes(overlaps, classes, ignored_boxes(overlaps.truth.area, size)) for size in ("", "s", "m", "l")]
    np.testing.assert_array_equal(ours, matches_of_coco(pairings, class_of))


def test_photos_that_are_compared_in_parts_give_the_same_pairs(monkeypatch: pytest.MonkeyPatch):
    whole = find_overlaps(random_photos(1)).pairs
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", 50)
    parts = find_overlaps(random_photos(1)).pairs
    for name in ("predicted", "truth", "iou", "turn"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("truth", [(), (BBUObject((0, 0, 9, 9), "a"),)])
@pytest.mark.parametrize("predicted", [(), (BBUObject((20, 20, 29, 29), "a"),)])
def test_without_overlaps_nothing_is_matched(truth: tuple[BBUObject, ...], predicted: tuple[BBUObject, ...]):
    overlaps = find_overlaps([Pairing((), ()), Pairing(truth, predicted)])
    matches = match_boxes(overlaps, classify_boxes(overlaps, str), np.zeros(len(truth), dtype=bool))
    assert matches.shape == (10, len(predicted)) and (matches == -1).all()
