"""Boxes as tensors: conversions, IoU and GIoU, differentiable and safe for degenerate boxes.

cxcywh and xyxy in any common unit; everything is computed in float32.
"""

from __future__ import annotations

import torch


def to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """[..., 4] cxcywh -> xyxy."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def to_centres(boxes: torch.Tensor) -> torch.Tensor:
    """[..., 4] xyxy -> cxcywh."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def iou_and_giou(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU (Rezatofighi et al., arXiv:1902.09630) of broadcastable [..., 4] xyxy boxes: two [...]."""
    first, second = first.float(), second.float()
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = extent(low, high)
    union = area(first) + area(second) - shared
    iou = shared / union.clamp(min=1e-9)
    hull_low, hull_high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    hull = extent(hull_low, hull_high).clamp(min=1e-9)
    return iou, iou - (hull - union) / hull


def area(boxes: torch.Tensor) -> torch.Tensor:
    """[..., 4] xyxy -> [...]; an inverted box has none."""
    return extent(boxes[..., :2], boxes[..., 2:])


def extent(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Area between two corners, [..., 2] each: [...]. Not by `prod`, whose backward waits for the device."""
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def pairwise_giou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[..., Q, 4] and [..., N, 4] xyxy -> [..., Q, N]."""
    return iou_and_giou(first[..., :, None, :], second[..., None, :, :])[1]
