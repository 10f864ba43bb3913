"""Which query answers for which object: the assignment of least cost, one vectorised cost for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from bbu.boxes import pairwise_iou_and_giou, to_corners
from bbu.config.domains import DetectionConfig

_WORST_COST = 1e6
"""Cost of a pair whose cost is not a finite number."""


@dataclass(frozen=True)
class Matches:
    """Matched pairs of all layers: four [R] int64 tensors. `target` counts through all samples' targets in order.

    Layer after layer, each with as many pairs: how many a sample has follows from its queries and targets alone.
    """

    layer: torch.Tensor
    sample: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor
    layers: int
    """how many layers' pairs these are"""

    @property
    def last_layer(self) -> Matches:
        """The pairs of the last layer alone: a slice, since looking for them would be one more wait for the device."""
        start = len(self.layer) - len(self.layer) // self.layers
        return Matches(self.layer[start:], self.sample[start:], self.query[start:], self.target[start:], layers=1)


class HungarianMatcher:
    """DETR's bipartite matching (arXiv:2005.12872), with the focal cost of Deformable DETR for objectness."""

    def __init__(self, config: DetectionConfig) -> None:
        self._box, self._giou = config.detection_cost_bbox, config.detection_cost_giou
        self._object = config.detection_cost_objectness
        self._alpha, self._gamma = config.detection_focal_alpha, config.detection_focal_gamma

    @torch.no_grad()
    def __call__(
        self, boxes: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> Matches:
        """boxes: [L, B, Q, 4] cxcywh; logits: [L, B, Q]; valid: [B, Q]; targets: B tensors [N, 4] cxcywh.

        A sample with more targets than valid queries gives every valid query one, at the least total cost.
        """
        counts = [len(t) for t in targets]
        pairs = np.zeros((4, 0), dtype=np.int64)
        if max(counts, default=0):
            pairs = _assign_targets(self._costs(boxes, logits, valid, targets).cpu().numpy(), counts)  # the one wait
        return Matches(*torch.from_numpy(pairs).to(boxes.device, non_blocking=True), layers=len(boxes))

    def _costs(
        self, boxes: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """[L, B, Q, N], N the most targets of a sample; infinite for padding queries, padding columns are not read."""
        truth = torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True).float()
        boxes = boxes.float()
        probability = logits.float().sigmoid()
        positive = self._alpha * (1 - probability) ** self._gamma * -torch.nn.functional.logsigmoid(logits.float())
        negative = (1 - self._alpha) * probability**self._gamma * -torch.nn.functional.logsigmoid(-logits.float())
        distance = torch.cdist(boxes, truth.expand(len(boxes), -1, -1, -1), p=1)
        _, giou = pairwise_iou_and_giou(to_corners(boxes), to_corners(truth))
        cost = self._box * distance - self._giou * giou + self._object * (positive - negative)[..., None]
        # A NaN must not end this rank here and leave the others waiting: the losses will be NaN too, and the step
        # is refused by all ranks together.
        cost = cost.nan_to_num(nan=_WORST_COST, posinf=_WORST_COST, neginf=_WORST_COST)
        return cost.masked_fill(~valid[None, :, :, None], float("inf"))


def _assign_targets(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """[L, B, Q, N] and B numbers of targets -> [4, R] int64: layer, sample, query, target, layer after layer."""
    offsets = np.cumsum([0, *counts])
    usable = [np.flatnonzero(np.isfinite(of_sample[:, 0])) for of_sample in costs[-1]]
    parts = []
    for layer, of_layer in enumerate(costs):
        for sample, (queries, count) in enumerate(zip(usable, counts, strict=True)):
            rows, columns = linear_sum_assignment(of_layer[sample, queries, :count])
            part = np.empty((4, len(rows)), dtype=np.int64)
            part[0], part[1], part[2], part[3] = layer, sample, queries[rows], columns + offsets[sample]
            parts.append(part)
    return np.concatenate(parts, axis=1)
