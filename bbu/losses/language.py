"""The language loss: cross entropy on supervised answers, as sums, with teachers' and students' tokens apart.

Nothing is averaged here. A mean over a micro-batch would make the gradient depend on how samples are spread
over micro-batches, ranks and packs; sums divided once by the global token count do not.

Shapes: B samples, S tokens of a sequence, T supervised tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Supervision:
    """Where a batch is supervised, aligned to the position that predicts: labels are shifted already."""

    positions: torch.Tensor
    """[B, S] bool, predicts a supervised token; fits the model's `logits_to_keep`"""
    targets: torch.Tensor
    """[T] int64, the tokens to predict"""
    is_teacher: torch.Tensor
    """[T] bool, the token belongs to a teacher's answer; every other one is the student's"""


@dataclass(frozen=True)
class LanguageSums:
    """Unweighted sums of token losses (nats, float32, with graph) and their token counts (int64)."""

    teacher_loss: torch.Tensor
    student_loss: torch.Tensor
    teacher_tokens: torch.Tensor
    student_tokens: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Sum over all supervised tokens."""
        return self.teacher_loss + self.student_loss

    @property
    def tokens(self) -> torch.Tensor:
        """All supervised tokens: summed over ranks and micro-batches, what `weighted` is divided by."""
        return self.teacher_tokens + self.student_tokens

    def weighted(self, teacher_weight: float, student_weight: float) -> torch.Tensor:
        """The sum to optimise, before division by the global token count."""
        return teacher_weight * self.teacher_loss + student_weight * self.student_loss


def find_supervision(labels: torch.Tensor, teacher_mask: torch.Tensor, *, ignore_index: int = -100) -> Supervision:
    """Align labels to the positions that predict them.

    labels: [B, S] int64, not shifted; `ignore_index` where unsupervised. The first token of a sequence has
        no predecessor and is never a target; in a pack the first token of each sample must be unsupervised.
    teacher_mask: [B, S] bool, tokens of teachers' answers.
    """
    supervised = labels[:, 1:] != ignore_index
    last = torch.zeros_like(supervised[:, :1])  # the last token predicts nothing
    return Supervision(
        positions=torch.cat([supervised, last], dim=1),
        targets=labels[:, 1:][supervised],
        is_teacher=teacher_mask[:, 1:][supervised],
    )


def language_sums(
    states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    supervision: Supervision,
    *,
    chunk_size: int = 0,
) -> LanguageSums:
    """Sums from the model's last states, with logits at supervised positions only.

    states: [B, S, H]; head: [*, H] -> [*, V], usually `lm_head`.
    chunk_size: logits of so many positions exist at once, recomputed in the backward pass; 0 is all, kept.
    """
    kept = states[supervision.positions]
    if not 0 < chunk_size < len(kept):
        return split_by_role(token_losses(head(kept), supervision.targets), supervision.is_teacher)
    losses = [
        _recomputed(head, part, targets)
        for part, targets in zip(kept.split(chunk_size), supervision.targets.split(chunk_size), strict=True)
    ]
    return split_by_role(torch.cat(losses), supervision.is_teacher)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[T, V] and [T] -> [T] float32. In float32 because a bfloat16 softmax over 150k tokens loses digits."""
    return cross_entropy(logits.float(), targets, reduction="none")


def split_by_role(losses: torch.Tensor, is_teacher: torch.Tensor) -> LanguageSums:
    """[T] losses and [T] bool -> sums; an empty batch gives zeros that still carry a graph."""
    zero = losses.new_zeros(())
    teacher_tokens = is_teacher.sum()
    return LanguageSums(
        # where, not a product: a NaN of one role must not become a NaN of the other.
        teacher_loss=torch.where(is_teacher, losses, zero).sum(),
        student_loss=torch.where(is_teacher, zero, losses).sum(),
        teacher_tokens=teacher_tokens,
        student_tokens=is_teacher.numel() - teacher_tokens,
    )


def _recomputed(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    def losses(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(head(states), targets)

    result = checkpoint(losses, states, targets, use_reentrant=False)
    assert isinstance(result, torch.Tensor)
    return result
