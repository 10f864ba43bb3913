"""The detection losses, as unweighted sums: boxes, objectness and captions of matched queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bbu.boxes import iou_and_giou, to_corners
from bbu.config.domains import DetectionConfig
from bbu.losses.matcher import Matches


@dataclass(frozen=True)
class DetectionSums:
    """Sums by name; inner layers are named `<name>_aux{i}`. `boxes`: the objects of this batch, int64."""

    sums: dict[str, torch.Tensor]
    boxes: torch.Tensor


class SetCriterion:
    """Losses of DETR (arXiv:2005.12872) with focal objectness (arXiv:1708.02002), before weights and means."""

    def __init__(self, config: DetectionConfig) -> None:
        self._alpha, self._gamma = config.detection_focal_alpha, config.detection_focal_gamma

    def __call__(
        self,
        boxes: torch.Tensor,
        logits: torch.Tensor,
        valid: torch.Tensor,
        targets: Sequence[torch.Tensor],
        matches: Matches,
    ) -> DetectionSums:
        """boxes: [L, B, Q, 4] cxcywh; logits: [L, B, Q]; valid: [B, Q]; targets: B tensors [N, 4]."""
        layers, truth = len(boxes), torch.cat(list(targets)).float()
        found = boxes.float()[matches.layer, matches.sample, matches.query]
        wanted = truth[matches.target]
        distance = (found - wanted).abs().sum(-1)
        overlap = 1 - iou_and_giou(to_corners(found), to_corners(wanted))[1]
        goal = torch.zeros_like(logits, dtype=torch.float32)
        goal[matches.layer, matches.sample, matches.query] = 1.0
        focal = focal_loss(logits, goal, valid, self._alpha, self._gamma)
        # A batch without objects still has a graph, and a NaN in any query that is none of padding is told.
        kept = boxes.float().masked_fill(~valid[..., None], 0.0).sum() * 0
        per_layer = {
            "bbox_l1_loss": by_layer(distance, matches.layer, layers) + kept,
            "bbox_giou_loss": by_layer(overlap, matches.layer, layers) + kept,
            "objectness_loss": focal.sum((1, 2)),
        }
        sums = {named(n, i, layers): value[i] for n, value in per_layer.items() for i in range(layers)}
        # `full` is filled on the device; `tensor` would be copied there, and the host would wait.
        return DetectionSums(sums, torch.full((), len(truth), dtype=torch.int64, device=boxes.device))


def named(name: str, layer: int, layers: int) -> str:
    return name if layer == layers - 1 else f"{name}_aux{layer}"


def by_layer(values: torch.Tensor, layer: torch.Tensor, layers: int) -> torch.Tensor:
    """Sum [R] values over the rows of each layer: [L]."""
    return values.new_zeros(layers).index_add(0, layer, values)


def focal_loss(
    logits: torch.Tensor, goal: torch.Tensor, valid: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Sigmoid focal loss, element by element, float32; 0 where not valid.

    Masked before and after: a NaN that is only masked after comes back in the gradient as 0 * NaN.
    """
    logits = logits.float().masked_fill(~valid, 0.0)
    entropy = binary_cross_entropy_with_logits(logits, goal, reduction="none")
    # The probability of being wrong. `1 - sigmoid` would round to 0, where a power below 1 has no gradient.
    wrong = (logits * (1 - 2 * goal)).sigmoid()
    weight = alpha * goal + (1 - alpha) * (1 - goal)
    return (weight * wrong**gamma * entropy).masked_fill(~valid, 0.0)


def caption_sums(logits: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, C, V] and [M, C] (-100 after the end) -> sum of token losses and their number.

    Position t predicts token t. Without any clue the mean is log(V), chance.
    """
    total = cross_entropy(logits.float().flatten(0, 1), captions.flatten(), ignore_index=-100, reduction="sum")
    return total, (captions != -100).sum()


def denoising_sums(
    boxes: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    positive: torch.Tensor,
    valid: torch.Tensor,
    *,
    alpha: float,
    gamma: float,
) -> dict[str, torch.Tensor]:
    """Losses of denoising queries, named `<name>_aux_dn{i}`.

    boxes: [L, B, K, 4]; logits: [L, B, K]; targets: [B, K, 4]; positive, valid: [B, K] bool.
    """
    near = positive & valid
    found = torch.where(near[..., None], boxes.float(), targets)  # what is not compared has no gradient, NaN or not
    distance = (found - targets).abs().sum(-1)
    overlap = (1 - iou_and_giou(to_corners(found), to_corners(targets))[1]).masked_fill(~near, 0.0)
    focal = focal_loss(logits, positive.float().expand_as(logits), valid, alpha, gamma)
    values = {"bbox_l1_loss": distance, "bbox_giou_loss": overlap, "objectness_loss": focal}
    return {f"{name}_aux_dn{i}": value[i].sum() for name, value in values.items() for i in range(len(boxes))}
