"""Which query answers for which object: the assignment of least cost, one vectorised cost for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from bbu.config.domains import DetectionConfig
from bbu.losses.boxes import pairwise_giou, to_corners

WORST = 1e6
"""Cost of a pair whose cost is not a number."""


@dataclass(frozen=True)
class Matches:
    """Matched pairs of all layers: four [R] int64 tensors. `target` counts through all samples' targets in order."""

    layer: torch.Tensor
    sample: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor
    layers: int

    @property
    def last_layer(self) -> Matches:
        """The pairs of the last layer alone."""
        own = self.layer == self.layers - 1
        return Matches(self.layer[own], self.sample[own], self.query[own], self.target[own], self.layers)


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

        A sample with more targets than valid queries leaves the costliest unmatched.
        """
        counts = [len(t) for t in targets]
        offsets = [sum(counts[:b]) for b in range(len(counts))]
        rows: list[tuple[int, int, int, int]] = []
        if max(counts, default=0):
            costs = self._costs(boxes, logits, valid, targets).cpu().numpy()  # the one wait for the device
            for b, count in enumerate(counts):
                queries = (~np.isinf(costs[-1, b, :, 0])).nonzero()[0]
                for layer in range(len(boxes)):
                    picked = linear_sum_assignment(costs[layer, b][queries, :count])
                    rows += [(layer, b, int(queries[q]), offsets[b] + int(t)) for q, t in zip(*picked, strict=True)]
        table = torch.tensor(rows, dtype=torch.int64, device=boxes.device).reshape(-1, 4)
        return Matches(*table.unbind(-1), layers=len(boxes))

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
        giou = pairwise_giou(to_corners(boxes), to_corners(truth))
        cost = self._box * distance - self._giou * giou + self._object * (positive - negative)[..., None]
        # A NaN must not end this rank here and leave the others waiting: the losses will be NaN too, and the step
        # is refused by all ranks together.
        cost = cost.nan_to_num(nan=WORST, posinf=WORST, neginf=-WORST)
        return cost.masked_fill(~valid[None, :, :, None], float("inf"))
