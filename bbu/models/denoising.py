"""Denoising queries: the truth's boxes, disturbed, to be put right again (DINO, arXiv:2203.03605).

They give the decoder boxes to refine from its first step on, before its own queries have found anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64


@dataclass(frozen=True)
class Denoising:
    """K extra queries for each of N samples, in groups that hold every object twice: near, and a little further off."""

    boxes: Float32[torch.Tensor, "N K 4"]
    """cxcywh, disturbed"""
    targets: Float32[torch.Tensor, "N K 4"]
    """cxcywh, as they are"""
    positive: Bool[torch.Tensor, "N K"]
    """near enough to be the object; the others are to say that they are none"""
    valid: Bool[torch.Tensor, "N K"]
    """samples have different numbers of objects"""
    group: Int64[torch.Tensor, " K"]


def disturb(targets: Sequence[torch.Tensor], queries: int, noise: float) -> Denoising | None:
    """As many whole groups as fit into `queries`, at least one; None where no sample has an object.

    targets: N tensors [O, 4] cxcywh. noise: a centre moves by up to noise times half the box's size, and sizes
    change by up to noise times themselves; of the negatives, by once to twice as much. Uses torch's random state.
    """
    most = max(len(boxes) for boxes in targets)
    if most == 0:
        return None
    groups = max(1, queries // (2 * most))
    truth = torch.stack([torch.nn.functional.pad(boxes, (0, 0, 0, most - len(boxes))) for boxes in targets])
    real = torch.arange(most, device=truth.device) < torch.tensor([[len(b)] for b in targets], device=truth.device)
    repeated = truth.repeat(1, 2 * groups, 1)
    positive = torch.arange(2 * groups, device=truth.device).repeat_interleave(most) % 2 == 0
    strength = torch.rand_like(repeated) + (~positive)[None, :, None]
    sign = torch.randint_like(repeated, 2) * 2 - 1
    change = strength * sign * noise * torch.cat([repeated[..., 2:] / 2, repeated[..., 2:]], dim=-1)
    disturbed = torch.cat(
        [(repeated + change)[..., :2].clamp(0, 1), (repeated + change)[..., 2:].clamp(0.002, 1)], dim=-1
    )
    return Denoising(
        boxes=disturbed,
        targets=repeated,
        positive=positive.expand(len(truth), -1),
        valid=real.repeat(1, 2 * groups),
        group=torch.arange(groups, device=truth.device).repeat_interleave(2 * most),
    )
