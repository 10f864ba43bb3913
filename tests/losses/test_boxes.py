"""Boxes as tensors, beside transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

from bbu.losses.boxes import area, iou_and_giou, pairwise_giou, to_centres, to_corners


def random_corners(count: int, seed: int) -> torch.Tensor:
    low = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    size = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([low, low + size + 0.01], dim=-1)


@settings(deadline=None)  # the first call is slow on a busy machine
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_every_pair_agrees_with_transformers(first: int, second: int, seed: int):
    one, other = random_corners(first, seed), random_corners(second, seed + 7)
    torch.testing.assert_close(pairwise_giou(one, other), generalized_box_iou(one, other), atol=1e-6, rtol=0)
    iou = iou_and_giou(one[:, None], other[None])[0]
    torch.testing.assert_close(iou, box_iou(one, other)[0], atol=1e-6, rtol=0)


def test_the_two_forms_are_inverse():
    corners = random_corners(20, 3)
    torch.testing.assert_close(to_corners(to_centres(corners)), corners)


@pytest.mark.parametrize("box", [[0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.2, 0.2]])
def test_degenerate_boxes_give_finite_values_and_gradients(box: list[float]):
    wrong = torch.tensor([box], requires_grad=True)
    iou, giou = iou_and_giou(wrong, torch.tensor([[0.1, 0.1, 0.4, 0.4]]))
    (iou + giou).sum().backward()
    assert area(wrong).item() == 0 and torch.isfinite(giou).all()
    assert wrong.grad is not None and torch.isfinite(wrong.grad).all()


def test_half_precision_is_computed_in_float32():
    corners = random_corners(5, 1)
    assert iou_and_giou(corners.bfloat16(), corners.bfloat16())[1].dtype == torch.float32
