"""Which losses are trained, what each weighs, and what the log says about them.

Losses arrive as unweighted sums with the count each is a mean over (tokens, boxes). The objective divides by
counts that are global over ranks and accumulation, so neither changes the gradient. The log divides sums over
the whole logging window by counts over the window, so a long answer weighs as much as its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bbu.config.domains import DetectionConfig, TrainingConfig
from bbu.losses.language import LanguageSums

COUNTED_BY = {
    "teacher_lm_loss": "lm_tokens",
    "student_lm_loss": "lm_tokens",
    "bbox_l1_loss": "boxes",
    "bbox_giou_loss": "boxes",
    "objectness_loss": "boxes",
    "caption_loss": "caption_tokens",
}
"""Each trained loss and the global count its sum is divided by in the objective."""

LANGUAGE = ("teacher_lm_loss", "student_lm_loss")
AUX_SUFFIX = "_aux"
"""A loss of an inner decoder layer has the last layer's name, plus this and the layer: `bbox_l1_loss_aux0`."""


@dataclass(frozen=True)
class LossSum:
    """An unweighted sum (scalar, with graph) and the number of terms behind it on this rank (scalar)."""

    total: torch.Tensor
    count: torch.Tensor


class LossManager:
    """Weighs the losses of a run and keeps their sums over the logging window.

    device: where the running sums live, and with them the collective that reduces them.
    """

    def __init__(
        self, training: TrainingConfig, detection: DetectionConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.weights = loss_weights(training, detection)
        self._aux_weight = detection.detection_aux_weight
        self.head_share = 1.0
        """Factor on all losses of the detection head; 0 while it is frozen."""
        self._window = torch.zeros(len(self.weights), 2, dtype=torch.float64, device=device)

    @property
    def names(self) -> tuple[str, ...]:
        """The trained losses in a fixed order: every rank reduces the same rows, whatever its batches held."""
        return tuple(self.weights)

    def weight(self, name: str) -> float:
        """Weight of a loss in the objective; inner decoder layers weigh detection_aux_weight of the last's."""
        base = base_name(name)
        if base not in self.weights:
            raise KeyError(f"loss {name} is not trained here; known: {', '.join(self.names)}")
        share = 1.0 if base in LANGUAGE else self.head_share
        return self.weights[base] * share * (self._aux_weight if base != name else 1.0)

    def objective(
        self, losses: Mapping[str, LossSum], normalisers: Mapping[str, float], *, world_size: int = 1
    ) -> torch.Tensor:
        """Scalar to differentiate for one micro-batch.

        normalisers: from `global_counts` over the whole optimizer step.
        world_size: DDP averages gradients over ranks; multiplying by it makes the average a sum.
        """
        terms = [
            self.weight(name) * loss.total / normalisers[COUNTED_BY[base_name(name)]] for name, loss in losses.items()
        ]
        return torch.stack(terms).sum() * world_size

    def update(self, losses: Mapping[str, LossSum]) -> None:
        """Add a micro-batch to the window, without waiting for the device. Inner layers are not logged."""
        for row, name in enumerate(self.names):
            if name in losses:
                loss = losses[name]
                self._window[row] += torch.stack([_double(loss.total), _double(loss.count)]).to(self._window.device)

    def window_means(self) -> dict[str, float]:
        """Unweighted means over the window and all ranks; then the window starts anew. All ranks must call.

        A loss without any term in the window is left out rather than shown as zero.
        """
        window = self._window.clone()
        self._window.zero_()
        if dist.is_initialized():
            dist.all_reduce(window)
        sums = dict(zip(self.names, window.tolist(), strict=True))
        language = [sums[name] for name in LANGUAGE]
        rows = {"lm_loss": [sum(column) for column in zip(*language, strict=True)], **sums}
        return {name: total / count for name, (total, count) in rows.items() if count > 0}


def loss_weights(training: TrainingConfig, detection: DetectionConfig) -> dict[str, float]:
    """Weight of each trained loss; the head's are absent where the head is off."""
    weights = {
        "teacher_lm_loss": training.teacher_loss_weight,
        "student_lm_loss": training.student_loss_weight,
    }
    if detection.detection_enabled:
        own = {
            "bbox_l1_loss": detection.detection_bbox_weight,
            "bbox_giou_loss": detection.detection_giou_weight,
            "objectness_loss": detection.detection_objectness_weight,
            "caption_loss": detection.detection_caption_weight,
        }
        weights |= {name: weight * detection.detection_loss_weight for name, weight in own.items()}
    return weights


def language_losses(sums: LanguageSums) -> dict[str, LossSum]:
    """The language loss under the names of the log. `lm_loss` is their sum and no loss of its own."""
    return {
        "teacher_lm_loss": LossSum(sums.teacher_loss, sums.teacher_tokens),
        "student_lm_loss": LossSum(sums.student_loss, sums.student_tokens),
    }


def global_counts(counts: Mapping[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Counts of one optimizer step summed over ranks, at least 1 each. All ranks must call.

    counts: what this rank's micro-batches of the step hold together; every rank names the same keys.
    """
    names = sorted(counts)
    summed = torch.tensor([counts[name] for name in names], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return dict(zip(names, summed.clamp(min=1.0).tolist(), strict=True))


def base_name(name: str) -> str:
    """`bbox_l1_loss_aux0` -> `bbox_l1_loss`; a loss of the last layer is its own base."""
    return name.split(AUX_SUFFIX)[0]


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double()
