"""Bipartite matching of queries and objects, with one vectorised cost for all samples and decoder layers.

Shapes: L outputs of the head, B samples, Q queries of a sample, N targets of a sample, R matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from bbu.boxes import pairwise_iou_and_giou, to_corners
from bbu.config.domains import DetectionConfig

_WORST_COST = 1e6
"""Stands in for a cost that is not finite: far above every real one, and finite, as linear_sum_assignment needs."""


@dataclass(frozen=True)
class Matches:
    """R matched pairs of a query and a target, ordered by layer.

    Every layer has the same number of pairs, because it follows from the numbers of queries and targets alone.
    """

    layer: torch.Tensor
    """[R] int64: output of the head."""
    sample: torch.Tensor
    """[R] int64: sample in the batch."""
    query: torch.Tensor
    """[R] int64: query of the sample."""
    target: torch.Tensor
    """[R] int64: target, counted through all samples of the batch in order."""
    layers: int
    """Number of layers that the pairs belong to."""

    @property
    def last_layer(self) -> Matches:
        """The pairs of the last layer. A slice: to search for them would make the host wait for the device again."""
        start = len(self.layer) - len(self.layer) // self.layers
        return Matches(self.layer[start:], self.sample[start:], self.query[start:], self.target[start:], layers=1)


class HungarianMatcher:
    """Bipartite matching of DETR (arXiv:2005.12872), with the focal cost of Deformable DETR (arXiv:2010.04159)."""

    def __init__(self, config: DetectionConfig) -> None:
        self._box, self._giou = config.detection_cost_bbox, config.detection_cost_giou
        self._object = config.detection_cost_objectness
        self._alpha, self._gamma = config.detection_focal_alpha, config.detection_focal_gamma

    @torch.no_grad()
    def __call__(
        self, boxes: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> Matches:
        """Match every target to one query, at the least total cost of each layer and sample.

        In a sample with more targets than valid queries, every valid query gets a target and the others stay
        unmatched.

        Args:
            boxes: [L, B, Q, 4] cxcywh.
            logits: [L, B, Q], objectness.
            valid: [B, Q] bool, False at padding.
            targets: B tensors [N, 4] cxcywh.

        Shapes: L outputs of the head, B samples, Q queries, N targets of a sample.
        """
        counts = [len(t) for t in targets]
        pairs = np.zeros((4, 0), dtype=np.int64)
        if max(counts, default=0):
            costs = self._costs(boxes, logits, valid, targets).cpu().numpy()  # the only wait for the device
            pairs = _assign_targets(costs, counts)
        return Matches(*torch.from_numpy(pairs).to(boxes.device, non_blocking=True), layers=len(boxes))

    def _costs(
        self, boxes: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Cost of each pair: [L, B, Q, N], infinite for padding queries; columns of padding targets are not read.

        L outputs of the head, B samples, Q queries, N the most targets of any sample.
        """
        truth = torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True).float()
        boxes = boxes.float()
        probability = logits.float().sigmoid()
        # The focal loss that a query would have as an object, less the one it would have as none.
        positive = self._alpha * (1 - probability) ** self._gamma * -torch.nn.functional.logsigmoid(logits.float())
        negative = (1 - self._alpha) * probability**self._gamma * -torch.nn.functional.logsigmoid(-logits.float())
        distance = torch.cdist(boxes, truth.expand(len(boxes), -1, -1, -1), p=1)
        _, giou = pairwise_iou_and_giou(to_corners(boxes), to_corners(truth))
        cost = self._box * distance - self._giou * giou + self._object * (positive - negative)[..., None]
        # A NaN must not stop this rank here while the others wait: the losses will be NaN too, and then all ranks
        # refuse the step together.
        cost = cost.nan_to_num(nan=_WORST_COST, posinf=_WORST_COST, neginf=_WORST_COST)
        return cost.masked_fill(~valid[None, :, :, None], float("inf"))


def _assign_targets(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Solve the assignment of each layer and sample.

    Args:
        costs: [L, B, Q, N].
        counts: number of targets of each of B samples.

    Returns:
        [4, R] int64: layer, sample, query and target (counted through all samples) of each pair, ordered by layer.

    Shapes: L outputs of the head, B samples, Q queries, N the most targets of any sample, R pairs.
    """
    offsets = np.cumsum([0, *counts])
    # Padding queries have infinite costs in every layer; they are left out.
    usable = [np.flatnonzero(np.isfinite(sample_costs[:, 0])) for sample_costs in costs[-1]]
    parts = []
    for layer, layer_costs in enumerate(costs):
        for sample, (queries, count) in enumerate(zip(usable, counts, strict=True)):
            rows, columns = linear_sum_assignment(layer_costs[sample, queries, :count])
            part = np.empty((4, len(rows)), dtype=np.int64)
            part[0], part[1], part[2], part[3] = layer, sample, queries[rows], columns + offsets[sample]
            parts.append(part)
    return np.concatenate(parts, axis=1)
