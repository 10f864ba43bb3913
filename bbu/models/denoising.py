"""Denoising queries: ground-truth boxes with noise, which the decoder learns to restore (DINO, arXiv:2203.03605).

They give the decoder boxes to refine from its first step on, before its own queries point at any object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch.nn.utils.rnn import pad_sequence

_SMALLEST_SIDE = 0.002
"""Least width and height of a noisy box, as a share of the image: about one pixel of a 500-pixel side."""


@dataclass(frozen=True)
class Denoising:
    """Denoising queries of a batch. N samples, K queries of each; boxes are cxcywh in 0..1 of the student image.

    The queries form groups. Each group holds every object of the sample twice: as a positive, near its true box, and
    as a negative, further off.
    """

    boxes: Float32[torch.Tensor, "N K 4"]
    """The noisy boxes that the decoder starts from."""
    targets: Float32[torch.Tensor, "N K 4"]
    """The true boxes."""
    positive: Bool[torch.Tensor, "N K"]
    """True where the query shall predict its object; the others shall predict that they are no object."""
    valid: Bool[torch.Tensor, "N K"]
    """False at padding: samples differ in their numbers of objects."""
    group: Int64[torch.Tensor, " K"]
    """Number of the group that each query belongs to, counted from 0."""
    groups: int
    """Number of groups."""


def draw_denoising_queries(targets: Sequence[torch.Tensor], queries: int, noise: float) -> Denoising | None:
    """Draw as many complete groups as fit into `queries`, and at least one. Uses torch's random state.

    Args:
        targets: true boxes of N samples, each [O, 4] cxcywh (O objects of the sample).
        queries: most queries of a sample.
        noise: a positive's centre moves by up to `noise` times half the side of its box, and its sides change by up to
            `noise` times themselves; a negative's by once to twice as much.

    Returns:
        The queries, or None where no sample has an object.
    """
    most = max(len(boxes) for boxes in targets)
    if most == 0:
        return None
    # A group holds the most objects of any sample twice (positives, then negatives), so that samples can be stacked.
    groups = max(1, queries // (2 * most))
    # Pad every sample to `most` objects, and repeat them for each half of each group.
    truth = torch.stack([torch.nn.functional.pad(boxes, (0, 0, 0, most - len(boxes))) for boxes in targets])
    real = pad_sequence([boxes.new_ones(most, dtype=torch.bool)[: len(boxes)] for boxes in targets], batch_first=True)
    repeated = truth.repeat(1, 2 * groups, 1)
    # The halves take turns: even ones are positives, odd ones negatives.
    positive = torch.arange(2 * groups, device=truth.device).repeat_interleave(most) % 2 == 0
    # How far each coordinate changes: 0 to 1 for positives, 1 to 2 for negatives, in either direction ...
    strength = torch.rand_like(repeated) + (~positive)[None, :, None]
    sign = torch.randint_like(repeated, 2) * 2 - 1
    # ... in units of half the box's side for the centre, and of the side itself for width and height.
    change = strength * sign * noise * torch.cat([repeated[..., 2:] / 2, repeated[..., 2:]], dim=-1)
    # Centres stay inside the image; sides stay above zero.
    noisy = repeated + change
    boxes = torch.cat([noisy[..., :2].clamp(0, 1), noisy[..., 2:].clamp(_SMALLEST_SIDE, 1)], dim=-1)
    return Denoising(
        boxes=boxes,
        targets=repeated,
        positive=positive.expand(len(truth), -1),
        valid=real.repeat(1, 2 * groups),
        group=torch.arange(groups, device=truth.device).repeat_interleave(2 * most),
        groups=groups,
    )
