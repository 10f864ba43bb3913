"""The detection losses, as unweighted sums: boxes, objectness and captions of matched queries.

Shapes: L outputs of the head, B samples, Q queries of a sample, N targets of a sample, R matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from bbu.boxes import iou_and_giou, to_corners
from bbu.config.domains import DetectionConfig
from bbu.losses.language import token_losses
from bbu.losses.matcher import Matches
from bbu.schema import IGNORE_INDEX


@dataclass(frozen=True)
class DetectionSums:
    """The losses of a batch, summed over queries and samples."""

    sums: dict[str, torch.Tensor]
    """Sum of each loss by name; the losses of outputs before the last are named `<name>_aux{i}`."""
    boxes: torch.Tensor
    """[] int64: number of objects in the batch."""


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
        """Sum the losses of every output of the head.

        Args:
            boxes: [L, B, Q, 4] cxcywh.
            logits: [L, B, Q], objectness.
            valid: [B, Q] bool, False at padding.
            targets: B tensors [N, 4] cxcywh.
            matches: which query predicts which target.

        Shapes: L outputs of the head, B samples, Q queries, N targets of a sample.
        """
        # Boxes: the matched pairs alone.
        layers = len(boxes)
        predicted = boxes.float()[matches.layer, matches.sample, matches.query]
        true = torch.cat(list(targets)).float()[matches.target]
        distance = (predicted - true).abs().sum(-1)
        giou_loss = 1 - iou_and_giou(to_corners(predicted), to_corners(true))[1]
        # Objectness: every query, 1 where it is matched.
        is_object = torch.zeros_like(logits, dtype=torch.float32)
        is_object[matches.layer, matches.sample, matches.query] = 1.0
        focal = _focal_loss(logits, is_object, valid, self._alpha, self._gamma)
        # Zero, but it keeps the graph when the batch has no objects, and lets a NaN in any real (non-padding) query
        # reach the loss.
        zero = boxes.float().masked_fill(~valid[..., None], 0.0).sum() * 0
        per_layer = {
            "bbox_l1_loss": _sum_by_layer(distance, matches.layer, layers) + zero,
            "bbox_giou_loss": _sum_by_layer(giou_loss, matches.layer, layers) + zero,
            "objectness_loss": focal.sum((1, 2)),
        }
        # `unbind`, whose backward is one operation: that of `value[i]` fills a tensor of zeros for each layer and loss.
        sums = {_loss_name(n, i, layers): v for n, value in per_layer.items() for i, v in enumerate(value.unbind())}
        # `full` fills the number in on the device; `tensor` would copy it there, and the host would wait.
        return DetectionSums(sums, torch.full((), sum(len(t) for t in targets), dtype=torch.int64, device=boxes.device))


def _loss_name(name: str, layer: int, layers: int) -> str:
    """The last output's losses have the plain name, the others' a number."""
    return name if layer == layers - 1 else f"{name}_aux{layer}"


def _sum_by_layer(values: torch.Tensor, layer: torch.Tensor, layers: int) -> torch.Tensor:
    """Sum [R] values by the layer [R] of each pair: [L] (R pairs, L outputs of the head)."""
    return values.new_zeros(layers).index_add(0, layer, values)


def _focal_loss(
    logits: torch.Tensor, is_object: torch.Tensor, valid: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Sigmoid focal loss (arXiv:1708.02002) of each element, in float32; 0 where not valid.

    Args:
        logits: objectness, any shape.
        is_object: 1.0 or 0.0, of the same shape.
        valid: bool, broadcasts to the shape.
        alpha: weight of objects; the others weigh 1 - alpha.
        gamma: exponent that lowers the loss of queries that are right already.
    """
    # Masked before and after: a NaN that is masked after alone would return in the gradient as 0 * NaN.
    logits = logits.float().masked_fill(~valid, 0.0)
    entropy = binary_cross_entropy_with_logits(logits, is_object, reduction="none")
    # The probability of being wrong. `1 - sigmoid` would round to 0, where a power below 1 has no finite gradient.
    wrong = (logits * (1 - 2 * is_object)).sigmoid()
    weight = alpha * is_object + (1 - alpha) * (1 - is_object)
    return (weight * wrong**gamma * entropy).masked_fill(~valid, 0.0)


def caption_sums(
    states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], captions: torch.Tensor, *, chunk_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of captions: the sum over their tokens in nats, and the number of tokens.

    The mean is log(V) for a model that knows nothing.

    Args:
        states: [M, C, H]; the state at position t predicts token t.
        head: [*, H] -> [*, V], the language model's head (* any dimensions).
        captions: [M, C] int64, IGNORE_INDEX after the end token.
        chunk_size: as of `token_losses`.

    Shapes: M captions, C tokens in a caption, H width of the language model, V tokens in the vocabulary.
    """
    # Positions after the end are computed too: to leave them out, the host would have to wait for the device.
    losses = token_losses(states.flatten(0, 1), head, captions.flatten(), chunk_size)
    return losses.sum(), (captions != IGNORE_INDEX).sum()


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
    """Sum the losses of denoising queries (DINO, arXiv:2203.03605) of each decoder layer, named `<name>_aux_dn{i}`.

    Args:
        boxes: [L, B, K, 4] cxcywh.
        logits: [L, B, K], objectness.
        targets: [B, K, 4] cxcywh, the true boxes.
        positive: [B, K] bool, True where the query shall predict its object.
        valid: [B, K] bool, False at padding.
        alpha, gamma: of the focal loss.

    Shapes: L decoder layers, B samples, K denoising queries of a sample.
    """
    # Boxes: the positives alone. The others are replaced before anything is computed, so that their gradient is 0 even
    # where they are NaN.
    compared = positive & valid
    predicted = torch.where(compared[..., None], boxes.float(), targets)
    distance = (predicted - targets).abs().sum(-1)
    giou_loss = (1 - iou_and_giou(to_corners(predicted), to_corners(targets))[1]).masked_fill(~compared, 0.0)
    # Objectness: every query.
    focal = _focal_loss(logits, positive.float().expand_as(logits), valid, alpha, gamma)
    values = {"bbox_l1_loss": distance, "bbox_giou_loss": giou_loss, "objectness_loss": focal}
    sums = {name: value.sum((1, 2)).unbind() for name, value in values.items()}
    return {f"{name}_aux_dn{i}": layer for name, layers in sums.items() for i, layer in enumerate(layers)}
