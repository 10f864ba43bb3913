"""Objects that were detected twice: by two queries of the head, or by head and answer."""

from __future__ import annotations

import numpy as np
import pytest

from bbu.inference.merge import confirm_finds, overlaps_any, select_distinct
from bbu.schema import BBUObject

A, B = BBUObject((0, 0, 10, 10), "a"), BBUObject((20, 20, 30, 30), "b")
NEAR_A, FAR = BBUObject((1, 0, 11, 10), "a"), BBUObject((50, 50, 60, 60), "c")
OTHER_A = BBUObject((1, 0, 11, 10), "other words")


def corners(*objects: BBUObject) -> np.ndarray:
    return np.array([item.bbox_2d for item in objects], dtype=float).reshape(-1, 4)


def test_of_boxes_that_mark_the_same_part_the_best_is_selected():
    assert select_distinct(corners(A, B, NEAR_A, FAR), np.array([0.6, 0.2, 0.7, 0.9])) == [3, 2, 1]


def test_a_box_that_only_overlaps_one_that_is_not_selected_is_selected():
    chain = [BBUObject((x, 0, x + 10, 10), "") for x in (0, 3, 6)]  # IoU of neighbours 0.54, of the ends 0.25
    assert select_distinct(corners(*chain), np.array([0.9, 0.8, 0.7])) == [0, 2]
    assert select_distinct(corners(*chain), np.array([0.7, 0.9, 0.8])) == [1]


def test_equal_boxes_with_equal_scores_and_none_at_all():
    assert select_distinct(corners(A, A, A), np.array([0.5, 0.5, 0.5])) == [0]
    assert select_distinct(corners(), np.array([])) == []


def test_a_box_overlaps_any_of_some_objects():
    assert overlaps_any(corners(A, B), [FAR, NEAR_A]).tolist() == [True, False]
    assert overlaps_any(corners(A, B), []).tolist() == [False, False]


def test_finds_at_the_threshold_are_taken_whatever_the_answer_says():
    assert confirm_finds(([A, B], [0.5, 0.4]), ([FAR], [0.9]), 0.4) == ((A, B), (0.5, 0.4))


def test_a_weaker_find_that_the_answer_names_alike_is_taken_in_its_own_box():
    objects, scores = confirm_finds(([A, B], [0.9, 0.1]), ([NEAR_A, B], [0.8, 0.5]), 0.4)
    assert objects == (A, B) and scores == pytest.approx((0.98, 0.55))


def test_other_words_or_another_place_confirm_nothing():
    assert confirm_finds(([A], [0.1]), ([OTHER_A], [0.9]), 0.4) == ((), ())
    assert confirm_finds(([A], [0.1]), ([BBUObject((8, 8, 18, 18), "a")], [0.9]), 0.4) == ((), ())


def test_an_object_of_the_answer_confirms_one_find_and_a_find_is_confirmed_once():
    objects, scores = confirm_finds(([A, NEAR_A], [0.2, 0.1]), ([NEAR_A], [0.5]), 0.4)
    assert objects == (NEAR_A,) and scores == pytest.approx((0.55,))
    objects, scores = confirm_finds(([A], [0.2]), ([A, NEAR_A], [0.4, 0.5]), 0.4)
    assert objects == (A,) and scores == pytest.approx((0.6,))


def test_the_best_comes_first_after_confirmation():
    objects, _ = confirm_finds(([A, B], [0.6, 0.5]), ([B], [0.9]), 0.4)
    assert objects == (B, A)


def test_nothing_and_something():
    assert confirm_finds(([], []), ([A], [0.3]), 0.4) == ((), ())
    assert confirm_finds(([A], [0.4]), ([], []), 0.4) == ((A,), (0.4,))
