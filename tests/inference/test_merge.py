"""Answer and head as one list."""

from __future__ import annotations

import pytest

from bbu.inference.merge import merge_objects
from bbu.schema import BBUObject

A, B = BBUObject((0, 0, 10, 10), "a"), BBUObject((20, 20, 30, 30), "b")
NEAR_A, FAR = BBUObject((1, 0, 11, 10), "other words"), BBUObject((50, 50, 60, 60), "c")


def test_what_both_saw_is_kept_once_in_the_firsts_words_and_counts_as_confirmed():
    objects, scores = merge_objects(([A, B], [0.5, 0.4]), ([NEAR_A], [0.8]))
    assert objects == (A, B) and scores == pytest.approx((0.9, 0.4))


def test_what_the_second_saw_alone_follows_by_its_score():
    objects, scores = merge_objects(([A], [0.5]), ([FAR, B], [0.6, 0.7]))
    assert objects == (A, B, FAR) and scores == (0.5, 0.7, 0.6)


def test_two_boxes_of_the_second_do_not_confirm_the_same_object_twice():
    objects, scores = merge_objects(([A], [0.5]), ([NEAR_A, A], [0.2, 0.6]))
    assert objects == (A, NEAR_A) and scores == pytest.approx((0.8, 0.2))


def test_nothing_and_something():
    assert merge_objects(([], []), ([A], [0.3])) == ((A,), (0.3,))
    assert merge_objects(([A], [0.3]), ([], [])) == ((A,), (0.3,))
    assert merge_objects(([], []), ([], [])) == ((), ())
