"""Which losses are trained, the weight of each, and the means that the log shows.

Losses arrive as unweighted sums with the count that each is a mean over (tokens, boxes). The objective divides by
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

_COUNTED_BY = {
    "teacher_lm_loss": "lm_tokens",
    "student_lm_loss": "lm_tokens",
    "bbox_l1_loss": "boxes",
    "bbox_giou_loss": "boxes",
    "objectness_loss": "boxes",
    "caption_loss": "caption_tokens",
}
"""Each trained loss and the global count that the objective divides its sum by."""
_LANGUAGE_LOSSES = ("teacher_lm_loss", "student_lm_loss")
_AUX_SUFFIX = "_aux"
"""What follows the last layer's name in the losses of inner layers (`bbox_l1_loss_aux0`) and of denoising queries
(`bbox_l1_loss_aux_dn0`)."""


@dataclass(frozen=True)
class LossSum:
    """A loss of one rank as a sum, so that means can be taken over any number of batches and ranks."""

    total: torch.Tensor
    """The unweighted sum, a scalar with its graph."""
    count: torch.Tensor
    """The number of terms in the sum, a scalar."""


class LossManager:
    """Weighs the losses of a run and keeps their sums over the logging window.

    Args:
        training: weights of the language losses.
        detection: weights of the head's losses, if it is enabled.
        device: where the running sums are, and with them the collective that reduces them.
    """

    def __init__(
        self, training: TrainingConfig, detection: DetectionConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.weights = _loss_weights(training, detection)
        self._aux_weight = detection.detection_aux_weight
        self.head_share = 1.0
        """Factor on all losses of the detection head; 0 while it is frozen."""
        self._window = torch.zeros(len(self.weights), 2, dtype=torch.float64, device=device)

    @property
    def names(self) -> tuple[str, ...]:
        """The trained losses in a fixed order, so that every rank reduces the same rows whatever its batches hold."""
        return tuple(self.weights)

    def weight(self, name: str) -> float:
        """Weight of a loss in the objective; inner decoder layers weigh detection_aux_weight of the last layer's."""
        base = _base_name(name)
        if base not in self.weights:
            raise KeyError(f"loss {name} is not trained here; trained are {', '.join(self.names)}")
        share = 1.0 if base in _LANGUAGE_LOSSES else self.head_share
        return self.weights[base] * share * (self._aux_weight if base != name else 1.0)

    def objective(
        self, losses: Mapping[str, LossSum], normalisers: Mapping[str, torch.Tensor], *, world_size: int = 1
    ) -> torch.Tensor:
        """Compute the scalar to differentiate for one micro-batch.

        Args:
            losses: the sums of the micro-batch.
            normalisers: from `global_counts` over the whole optimizer step.
            world_size: DDP averages gradients over ranks; multiplying by it makes the average a sum.
        """
        terms = [
            self.weight(name) * loss.total / normalisers[_COUNTED_BY[_base_name(name)]] for name, loss in losses.items()
        ]
        return torch.stack(terms).sum() * world_size

    def update(self, losses: Mapping[str, LossSum]) -> None:
        """Add a micro-batch to the window, without waiting for the device. Inner layers are not logged."""
        for row, name in enumerate(self.names):
            if name in losses:
                loss = losses[name]
                self._window[row] += torch.stack([_double(loss.total), _double(loss.count)]).to(self._window.device)

    def window_means(self) -> dict[str, float]:
        """Return the unweighted means over the window and all ranks, and start a new window. Collective.

        A loss without any term in the window is left out rather than shown as zero.
        """
        window = self._window.clone()
        self._window.zero_()
        if dist.is_initialized():
            dist.all_reduce(window)
        sums = dict(zip(self.names, window.tolist(), strict=True))
        language = [sums[name] for name in _LANGUAGE_LOSSES]
        rows = {"lm_loss": [sum(column) for column in zip(*language, strict=True)], **sums}
        return {name: total / count for name, (total, count) in rows.items() if count > 0}


def language_losses(sums: LanguageSums) -> dict[str, LossSum]:
    """Put the language losses under their names in the log. `lm_loss` is their sum and not a loss of its own."""
    return {
        "teacher_lm_loss": LossSum(sums.teacher_loss, sums.teacher_tokens),
        "student_lm_loss": LossSum(sums.student_loss, sums.student_tokens),
    }


def global_counts(counts: Mapping[str, float], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Sum the counts of one optimizer step over ranks; each is at least 1. Collective.

    The sums stay on the device: reading them would make the host wait for the step before.

    Args:
        counts: what this rank's micro-batches of the step hold together; every rank has the same keys.
        device: where the collective runs.
    """
    names = sorted(counts)
    totals = torch.tensor([counts[name] for name in names], dtype=torch.float64).to(device, non_blocking=True)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return dict(zip(names, totals.clamp(min=1.0).float().unbind(), strict=True))


def _loss_weights(training: TrainingConfig, detection: DetectionConfig) -> dict[str, float]:
    """Weight of each trained loss; those of the head are absent where it is disabled."""
    weights = {
        "teacher_lm_loss": training.teacher_loss_weight,
        "student_lm_loss": training.student_loss_weight,
    }
    if detection.detection_enabled:
        head = {
            "bbox_l1_loss": detection.detection_bbox_weight,
            "bbox_giou_loss": detection.detection_giou_weight,
            "objectness_loss": detection.detection_objectness_weight,
            "caption_loss": detection.detection_caption_weight,
        }
        weights |= {name: weight * detection.detection_loss_weight for name, weight in head.items()}
    return weights


def _base_name(name: str) -> str:
    """`bbox_l1_loss_aux0` -> `bbox_l1_loss`; a loss of the last layer has its own name as base."""
    return name.split(_AUX_SUFFIX)[0]


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double()
