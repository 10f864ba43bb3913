"""A box: its two forms, its overlap with another, beside transformers' own, and its way between images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

from bbu.boxes import (
    box_area,
    boxes_overlap,
    iou_and_giou,
    pairwise_iou_and_giou,
    scale_box,
    to_centres,
    to_corners,
    turn_box,
)

A, B = (0, 0, 10, 10), (20, 20, 30, 30)


def random_corners(count: int, seed: int) -> torch.Tensor:
    low = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    size = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([low, low + size + 0.01], dim=-1)


@settings(deadline=None)  # the first call is slow on a busy machine
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_every_pair_agrees_with_transformers(first: int, second: int, seed: int):
    one, other = random_corners(first, seed), random_corners(second, seed + 7)
    iou, giou = pairwise_iou_and_giou(one, other)
    torch.testing.assert_close(giou, generalized_box_iou(one, other), atol=1e-6, rtol=0)
    torch.testing.assert_close(iou, box_iou(one, other)[0], atol=1e-6, rtol=0)


def test_the_two_forms_are_inverse():
    corners = random_corners(20, 3)
    torch.testing.assert_close(to_corners(to_centres(corners)), corners)


@pytest.mark.parametrize("box", [[0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.2, 0.2]])
def test_degenerate_boxes_give_finite_values_and_gradients(box: list[float]):
    wrong = torch.tensor([box], requires_grad=True)
    iou, giou = iou_and_giou(wrong, torch.tensor([[0.1, 0.1, 0.4, 0.4]]))
    (iou + giou).sum().backward()
    assert box_area(wrong).item() == 0 and torch.isfinite(giou).all()
    assert wrong.grad is not None and torch.isfinite(wrong.grad).all()


def test_half_precision_is_computed_in_float32():
    corners = random_corners(5, 1)
    assert iou_and_giou(corners.bfloat16(), corners.bfloat16())[1].dtype == torch.float32


def test_tensors_and_arrays_and_tuples_give_the_same_overlap():
    one, other = random_corners(6, 0), random_corners(5, 1)
    iou, giou = pairwise_iou_and_giou(one, other)
    for first, second in ((one.numpy(), other.numpy()), (one.tolist(), other.tolist())):
        same_iou, same_giou = pairwise_iou_and_giou(first, second)
        assert isinstance(same_iou, np.ndarray)
        np.testing.assert_allclose(same_iou, iou.numpy(), atol=1e-6)
        np.testing.assert_allclose(same_giou, giou.numpy(), atol=1e-6)
    np.testing.assert_array_equal(to_corners(to_centres(one.numpy())), to_corners(to_centres(one)).numpy())


def test_one_box_with_another():
    assert iou_and_giou(A, A)[0] == 1 and iou_and_giou(A, B)[0] == 0
    assert iou_and_giou((0, 0, 10, 10), (0, 0, 10, 5))[0] == 0.5


def test_boxes_that_only_touch_do_not_overlap():
    assert boxes_overlap(A, (9, 9, 12, 12))
    assert not boxes_overlap(A, (10, 0, 20, 10)) and not boxes_overlap(A, B)


def test_a_box_comes_back_from_another_image_size():
    assert scale_box((10, 20, 30, 40), (100, 50), (200, 25)) == (20, 10, 60, 20)
    assert scale_box((0.25, 0.5, 0.5, 1.0), (1, 1), (200, 100)) == (50, 50, 100, 100)


@pytest.mark.parametrize(("turn", "back"), [(6, 8), (8, 6)])
def test_opposite_quarter_turns_undo_each_other(turn: int, back: int):
    box = (1, 2, 30, 20)
    assert turn_box(turn_box(box, (60, 40), turn), (40, 60), back) == box
