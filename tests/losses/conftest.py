"""Random predictions and targets, and the criterion's config with Deformable DETR's constants."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from bbu.config.domains import DetectionConfig
from bbu.config.read import load_config


@dataclass
class Case:
    """boxes: [L, B, Q, 4] and logits: [L, B, Q] with gradients; targets: B tensors [N, 4]."""

    boxes: torch.Tensor
    logits: torch.Tensor
    valid: torch.Tensor
    targets: list[torch.Tensor]


def make_case(counts: list[int], queries: int = 10, layers: int = 2, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    boxes = torch.rand(layers, len(counts), queries, 4) * 0.4 + 0.1
    logits = torch.randn(layers, len(counts), queries)
    valid = torch.ones(len(counts), queries, dtype=torch.bool)
    return Case(boxes.requires_grad_(), logits.requires_grad_(), valid, [torch.rand(n, 4) * 0.4 + 0.1 for n in counts])


@pytest.fixture(scope="session")
def detection() -> DetectionConfig:
    return dataclasses.replace(
        load_config("smoke").detection, detection_cost_bbox=5.0, detection_cost_giou=2.0,
        detection_cost_objectness=2.0, detection_focal_alpha=0.25, detection_focal_gamma=2.0,
    )  # fmt: skip
