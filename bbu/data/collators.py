"""Samples to batches. The standard collator pads; what every collator hands on is listed in `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch

from bbu.data.types import IGNORE_INDEX, ROLE_CODES, Sample


class Batch(TypedDict):
    """B samples, padded to S tokens. The first six keys go to the model as they are."""

    input_ids: torch.Tensor
    """[B, S] int64"""
    attention_mask: torch.Tensor
    """[B, S] int64, 1 at real tokens"""
    labels: torch.Tensor
    """[B, S] int64, IGNORE_INDEX where unsupervised; not shifted"""
    mm_token_type_ids: torch.Tensor
    """[B, S] int64, 1 at image placeholders"""
    pixel_values: torch.Tensor
    """[P, 1176] float32, all images of all samples in order"""
    image_grid_thw: torch.Tensor
    """[I, 3] int64"""
    answer_roles: torch.Tensor
    """[B, S] int64, ROLE_CODES at supervised tokens, else 0"""
    student_image_mask: torch.Tensor
    """[B, S] bool, placeholders of the student's first image: what the detection head looks at"""
    student_prompt_mask: torch.Tensor
    """[B, S] bool, the student's instruction between image and answer; never the answer"""
    boxes: list[torch.Tensor]
    """B tensors [N, 4] float32, cxcywh in 0..1 of the student's first image"""
    descs: list[list[str]]
    """B lists of N descriptions"""
    sample_names: list[str]


class StandardDataCollator:
    """Pads on one side: right for training, left for generation."""

    def __init__(
        self, pad_token_id: int, *, pad_to_multiple_of: int = 1, side: Literal["left", "right"] = "right"
    ) -> None:
        self._pad_id, self._multiple, self._side = pad_token_id, max(1, pad_to_multiple_of), side

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        longest = max(len(s) for s in samples)
        width = -(-longest // self._multiple) * self._multiple

        def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([self._pad(row, width, value) for row in rows])

        return Batch(
            input_ids=pad([s.input_ids for s in samples], self._pad_id),
            attention_mask=pad([torch.ones_like(s.input_ids) for s in samples], 0),
            labels=pad([s.labels for s in samples], IGNORE_INDEX),
            mm_token_type_ids=pad([s.mm_token_type_ids for s in samples], 0),
            pixel_values=torch.cat([s.pixel_values for s in samples]),
            image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
            answer_roles=pad([answer_roles(s) for s in samples], 0),
            student_image_mask=pad([student_image_mask(s) for s in samples], 0),
            student_prompt_mask=pad([student_prompt_mask(s) for s in samples], 0),
            boxes=[normalised_boxes(s) for s in samples],
            descs=[[o.desc for o in s.objects] for s in samples],
            sample_names=[s.name for s in samples],
        )

    def _pad(self, row: torch.Tensor, width: int, value: int) -> torch.Tensor:
        missing = width - len(row)
        sides = (missing, 0) if self._side == "left" else (0, missing)
        return torch.nn.functional.pad(row, sides, value=value)


def answer_roles(sample: Sample) -> torch.Tensor:
    """[S] int64: who answers at each supervised token."""
    roles = torch.zeros_like(sample.input_ids)
    for span in sample.answers:
        roles[span.start : span.end] = ROLE_CODES[span.role]
    return roles


def student_image_mask(sample: Sample) -> torch.Tensor:
    """[S] bool: placeholders of the student's first image."""
    mask = torch.zeros(len(sample), dtype=torch.bool)
    first = next(span for span in sample.images if span.role == "student")
    mask[first.start : first.end] = True
    return mask


def student_prompt_mask(sample: Sample) -> torch.Tensor:
    """[S] bool: text after the student's last image and before its answer (or the end, where it has none)."""
    mask = torch.zeros(len(sample), dtype=torch.bool)
    last = [span for span in sample.images if span.role == "student"][-1]
    ends = [span.start for span in sample.answers if span.role == "student"]
    mask[last.end : ends[0] if ends else len(sample)] = True
    return mask


def normalised_boxes(sample: Sample) -> torch.Tensor:
    """[N, 4] float32 cxcywh in 0..1 of the student's first image."""
    corners = torch.tensor([o.bbox_2d for o in sample.objects], dtype=torch.float32).reshape(-1, 4)
    width, height = sample.image_size
    x1, y1, x2, y2 = (corners / torch.tensor([width, height, width, height])).unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)
