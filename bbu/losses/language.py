"""The language loss: cross entropy on supervised answers, as separate sums for teachers and students.

Nothing is averaged here. With a mean over each micro-batch, the gradient would depend on how samples are distributed
over micro-batches, ranks and packed rows. With sums, divided once by the global token count, it does not.

Shapes: B rows, S tokens in a row, T supervised tokens, H width of the language model, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from bbu.schema import IGNORE_INDEX


class Supervision(NamedTuple):
    """The supervised tokens of a batch, each aligned to the position that predicts it (labels are shifted already).

    T supervised tokens. A tuple, so that loaders pin it and trainers move it with the batch.
    """

    positions: torch.Tensor
    """[T] int64: the positions whose next token is supervised, in the rows laid end to end."""
    targets: torch.Tensor
    """[T] int64: the tokens to predict."""
    is_teacher: torch.Tensor
    """[T] bool: True for tokens of a teacher's answer; all others belong to the student's."""


@dataclass(frozen=True)
class LanguageSums:
    """Unweighted sums of token losses, and their numbers of tokens."""

    teacher_loss: torch.Tensor
    """[] float32 with graph: sum over the teachers' tokens, in nats."""
    student_loss: torch.Tensor
    """[] float32 with graph: sum over the students' tokens, in nats."""
    teacher_tokens: torch.Tensor
    """[] int64: supervised tokens of teachers."""
    student_tokens: torch.Tensor
    """[] int64: supervised tokens of students."""


def find_supervision(labels: torch.Tensor, teacher_mask: torch.Tensor) -> Supervision:
    """Align labels to the positions that predict them. On a device the host waits for it; on the CPU it costs little.

    Args:
        labels: [B, S] int64, not shifted; IGNORE_INDEX where unsupervised. The first token of a row has no
            predecessor and is never a target; in a packed row the first token of each sample must be unsupervised.
        teacher_mask: [B, S] bool, True at tokens of teachers' answers.

    Shapes: B rows, S tokens in a row.
    """
    # No token follows the last one of a row.
    next_labels, next_is_teacher = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), pad(teacher_mask[:, 1:], (0, 1))
    positions = (next_labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    return Supervision(positions, next_labels.flatten()[positions], next_is_teacher.flatten()[positions])


def language_sums(
    states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    supervision: Supervision,
    *,
    chunk_size: int = 0,
) -> LanguageSums:
    """Sum the losses of a batch, with logits at supervised positions only.

    Args:
        states: [B, S, H], the model's last states.
        head: [*, H] -> [*, V], usually `lm_head` (* any dimensions).
        supervision: the supervised tokens.
        chunk_size: number of positions whose logits exist at once; the backward pass computes them again. 0 keeps
            the logits of all positions.

    Shapes: B rows, S tokens in a row, H width of the language model, V tokens in the vocabulary.
    """
    losses = token_losses(states.flatten(0, 1)[supervision.positions], head, supervision.targets, chunk_size)
    return _split_by_role(losses, supervision.is_teacher)


def token_losses(
    states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Compute the cross entropy of each token in nats: [T], 0 where the target is IGNORE_INDEX.

    Args:
        states: [T, H], the states that predict the tokens.
        head: [*, H] -> [*, V], usually `lm_head` (* any dimensions).
        targets: [T] int64.
        chunk_size: number of tokens whose logits exist at once; the backward pass computes them again. 0 keeps the
            logits of all tokens.

    Shapes: T tokens, H width of the language model, V tokens in the vocabulary.
    """
    if not 0 < chunk_size < len(states):
        return _cross_entropies(head(states), targets)
    parts = zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([_recomputed_losses(head, *part) for part in parts])


def _cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token: [T, V] and [T] -> [T] (T tokens, V tokens in the vocabulary).

    In float32, because a bfloat16 softmax over 150,000 tokens is too inexact.
    """
    return cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


def _split_by_role(losses: torch.Tensor, is_teacher: torch.Tensor) -> LanguageSums:
    """Sum [T] losses by role; an empty batch gives zeros that still have a graph (T supervised tokens)."""
    zero = losses.new_zeros(())
    teacher_tokens = is_teacher.sum()
    return LanguageSums(
        # `where` instead of a product: a NaN of one role must not become a NaN of the other.
        teacher_loss=torch.where(is_teacher, losses, zero).sum(),
        student_loss=torch.where(is_teacher, zero, losses).sum(),
        teacher_tokens=teacher_tokens,
        student_tokens=is_teacher.numel() - teacher_tokens,
    )


def _recomputed_losses(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Token losses whose logits are not stored, but computed again in the backward pass."""

    def losses(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _cross_entropies(head(states), targets)

    result = checkpoint(losses, states, targets, use_reentrant=False)
    assert isinstance(result, torch.Tensor)
    return result
