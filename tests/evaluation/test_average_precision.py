"""Average precision: pycocotools' twelve numbers, digit for digit."""

from __future__ import annotations

import numpy as np
import pytest

from bbu.evaluation.average_precision import average_precision
from bbu.evaluation.matching import ClassOf, Pairing, find_overlaps
from tests.evaluation.coco import random_photos, run_coco


def numbers_of_coco(pairings: list[Pairing], class_of: ClassOf) -> list[float]:
    """The numbers of `COCOeval.summarize`, with AP over all boxes of a photo instead of the first hundred."""
    evaluator = run_coco(pairings, class_of, [1, 10, 100, 1000])
    precision, recall = evaluator.eval["precision"][..., -1], evaluator.eval["recall"]
    sizes = range(1, 4)
    entries = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., i] for i in sizes)]
    entries += [recall[:, :, 0, i] for i in range(3)] + [recall[:, :, i, -1] for i in sizes]
    return [float(np.mean(e[e > -1])) if (e > -1).any() else -1.0 for e in entries]


@pytest.mark.parametrize("class_of", [str, lambda description: "object"], ids=["by class", "one class"])
@pytest.mark.parametrize("seed", range(12))
def test_the_numbers_are_those_of_pycocotools(seed: int, class_of: ClassOf):
    pairings = random_photos(seed)
    ours = average_precision(find_overlaps(pairings), class_of)
    assert list(ours.values()) == pytest.approx(numbers_of_coco(pairings, class_of), abs=1e-12)


def test_where_no_photo_has_more_than_a_hundred_boxes_they_are_those_of_its_summary():
    pairings = random_photos(2)
    evaluator = run_coco(pairings, str, [1, 10, 100])
    evaluator.summarize()
    assert list(average_precision(find_overlaps(pairings), str).values()) == pytest.approx(list(evaluator.stats))
