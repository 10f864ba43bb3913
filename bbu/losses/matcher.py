"""Bipartite matching of queries and objects, with one vectorised cost for all samples and decoder layers.

Shapes: L outputs of the head, B samples, Q queries of a sample, N targets of a sample, M targets of all samples, R
matched pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from bbu.boxes import SMALLEST_AREA
from bbu.config.domains import DetectionConfig

_WORST_COST = 1e6
"""Stands in for a cost that is not finite: far above every real one, and finite, as linear_sum_assignment needs."""
_PAIRS_IN_CACHE = 2**15
"""Costs that a CPU computes at once: its cache holds the dozen arrays of 128 KB that this takes."""


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
        if any(counts):
            costs = self._costs(boxes, logits, valid, targets).cpu()  # the only wait for the device
            # linear_sum_assignment computes in float64, and would convert each of its many matrices by itself.
            pairs = _assign_targets(costs.double().numpy(), counts)
        return Matches(*torch.from_numpy(pairs).to(boxes.device, non_blocking=True), layers=len(boxes))

    def _costs(
        self, boxes: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Cost of each target and each query of its sample: [L, M, Q], infinite for padding queries.

        L outputs of the head, M targets of all samples, Q queries of a sample.
        """
        probability = logits.float().sigmoid()
        # The focal loss that a query would have as an object, less the one it would have as none.
        positive = self._alpha * (1 - probability) ** self._gamma * -torch.nn.functional.logsigmoid(logits.float())
        negative = (1 - self._alpha) * probability**self._gamma * -torch.nn.functional.logsigmoid(-logits.float())
        queries = torch.cat([_to_planes(boxes), self._object * (positive - negative)[None]])
        truth = _to_planes(torch.cat(list(targets)))[:, None, :, None]  # [4, 1, M, 1]
        # Added, because masked_fill takes six times as long on a CPU.
        padding = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, float("inf"))
        counts = [len(t) for t in targets]
        size = _PAIRS_IN_CACHE // max(logits[:, 0].numel(), 1) if boxes.device.type == "cpu" else sum(counts)
        blocks = [
            self._block_costs(queries[:, :, samples], truth[:, :, rows], padding[samples], counts[samples])
            for samples, rows in _blocks(counts, size)
        ]
        return torch.cat(blocks, dim=1)

    def _block_costs(
        self, queries: torch.Tensor, truth: torch.Tensor, padding: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Cost of some samples: [L, M, Q].

        Args:
            queries: [5, L, B, Q]: centres, half sizes and the cost of being an object.
            truth: [4, 1, M, 1]: centres and half sizes.
            padding: [B, Q], infinite for padding queries, else 0.
            counts: number of targets of each sample.
        """
        queries, padding = _repeat_samples(queries, counts), _repeat_samples(padding, counts)
        distance, shared, union, hull = _compare_boxes(queries[:4], truth)
        cost = torch.add(queries[4], distance, alpha=self._box)
        # GIoU is IoU - (hull - union) / hull; its constant, -1, changes no assignment.
        cost.addcdiv_(shared, union, value=-self._giou).addcdiv_(union, hull, value=-self._giou)
        # A NaN must not stop this rank here while the others wait: the losses will be NaN too, and then all ranks
        # refuse the step together.
        return cost.nan_to_num_(nan=_WORST_COST, posinf=_WORST_COST, neginf=_WORST_COST).add_(padding)


def _to_planes(boxes: torch.Tensor) -> torch.Tensor:
    """Change boxes [..., 4] cxcywh to centres and half sizes [4, ...] float32: each coordinate a plane of its own.

    Whatever is computed of one coordinate of many boxes then reads and writes adjacent numbers.
    """
    planes = boxes.float().movedim(-1, 0)
    return torch.cat([planes[:2], planes[2:] / 2])


def _blocks(counts: Sequence[int], size: int) -> Iterator[tuple[slice, slice]]:
    """Split the samples into blocks with at most `size` targets, or one sample: slices of samples and of targets."""
    start, first, end = 0, 0, 0
    for sample, count in enumerate(counts):
        if sample > start and end + count - first > size:
            yield slice(start, sample), slice(first, end)
            start, first = sample, end
        end += count
    yield slice(start, len(counts)), slice(first, end)


def _repeat_samples(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Repeat the row of each sample for each of its targets: [..., B, Q] to [..., M, Q]; a single row stays one."""
    if len(counts) == 1:
        return values
    # Not `repeat_interleave`, which would copy the counts to the device.
    rows = zip(values.split(1, dim=-2), counts, strict=True)
    return torch.cat([row.expand(*row.shape[:-2], count, row.shape[-1]) for row, count in rows], dim=-2)


def _compare_boxes(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the absolute differences of boxes, and the areas of their intersection, union and hull: four [...].

    Along an axis, two boxes with the half sizes h and k whose centres are d apart share h + k - max(d, |h - k|), and
    their hull measures h + k + max(d, |h - k|): all follows from the differences, without any corner.

    Args:
        first, second: [4, ...] as `_to_planes` gives them, which broadcast together.
    """
    apart = (first - second).abs_()
    distance = torch.add(apart[0], apart[1]).add_(apart[2], alpha=2).add_(apart[3], alpha=2)
    reach = torch.maximum(apart[:2], apart[2:])
    sizes = first[2:] + second[2:]
    shared = (sizes - reach).clamp_(min=0)
    shared = shared[0].mul_(shared[1])
    hull = sizes.add_(reach)
    hull = hull[0].mul_(hull[1]).clamp_(min=SMALLEST_AREA)
    areas = 4 * first[2] * first[3] + 4 * second[2] * second[3]
    return distance, shared, areas.sub_(shared).clamp_(min=SMALLEST_AREA), hull


def _assign_targets(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Solve the assignment of each layer and sample.

    Args:
        costs: [L, M, Q].
        counts: number of targets of each of B samples.

    Returns:
        [4, R] int64: layer, sample, query and target (counted through all samples) of each pair, ordered by layer.

    Shapes: L outputs of the head, M targets of all samples, Q queries, R pairs.
    """
    queries = np.full(costs.shape[:2], -1)  # [L, M]: the query of each target, -1 for none
    ends = np.cumsum(counts)
    for end, count in zip(ends.tolist(), counts, strict=True):
        if not count:
            continue
        sample_costs = costs[:, end - count : end]
        # Padding queries have infinite costs in every layer; they are left out.
        usable = np.flatnonzero(np.isfinite(sample_costs[-1, 0]))
        if len(usable) < costs.shape[2]:
            sample_costs = sample_costs[:, :, usable]
        for layer, layer_costs in enumerate(sample_costs):
            rows, columns = linear_sum_assignment(layer_costs)
            queries[layer, end - count + rows] = usable[columns]
    layer, target = np.nonzero(queries >= 0)
    return np.stack([layer, np.searchsorted(ends, target, side="right"), queries[layer, target], target])
