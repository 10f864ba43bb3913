"""Collates samples into batches: the standard collator pads them, the packed one joins them into one row.

`Batch` and `PackedBatch` list what a batch holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from bbu.boxes import to_centres
from bbu.data.positions import mrope_positions
from bbu.data.types import Sample
from bbu.errors import DataError
from bbu.resize import MERGE_SIZE
from bbu.schema import IGNORE_INDEX, ROLE_CODES


class StudentFields(TypedDict):
    """What the detection head sees and shall predict. The same for both kinds of batch.

    The head sees the student's own image and instruction, never an answer, a teacher or another sample. N samples,
    T tokens of the longest instruction, O objects of a sample, M objects of all samples, C tokens of the longest
    description.
    """

    student_images: torch.Tensor
    """[N] int64: row of image_grid_thw of each student's first image."""
    prompt_ids: torch.Tensor
    """[N, T] int64: the students' instructions, padded on the right."""
    prompt_mask: torch.Tensor
    """[N, T] bool: True at real tokens."""
    boxes: list[torch.Tensor]
    """N tensors [O, 4] float32: cxcywh in 0..1 of the student's first image."""
    caption_ids: torch.Tensor
    """[M, C] int64: descriptions of all objects of all samples in order, IGNORE_INDEX after the end token."""
    sample_names: list[str]
    """Names of the N samples, for messages."""


class Batch(StudentFields):
    """B samples, padded to S tokens, with I images of P patches together. The first six keys go to the model as is."""

    input_ids: torch.Tensor
    """[B, S] int64."""
    attention_mask: torch.Tensor
    """[B, S] int64: 1 at real tokens."""
    position_ids: NotRequired[torch.Tensor]
    """[3, B, S] int64: the mRoPE positions, 0 at padding. Absent on the left side, where generation computes them:
    it also needs how far they lag behind the tokens."""
    mm_token_type_ids: torch.Tensor
    """[B, S] int64: 1 at image placeholders."""
    pixel_values: torch.Tensor
    """[P, 1176] float32: patches of all images of all samples in order."""
    image_grid_thw: torch.Tensor
    """[I, 3] int64: (time, rows, columns) of each image in patches."""
    labels: torch.Tensor
    """[B, S] int64: IGNORE_INDEX where unsupervised; not shifted."""
    answer_roles: torch.Tensor
    """[B, S] int64: ROLE_CODES at supervised tokens, 0 elsewhere."""


class PackedBatch(StudentFields):
    """N samples joined in one row of S tokens, with I images of P patches together.

    The first five keys go to the model as is. There is no attention_mask: with one, even one of ones alone, the model
    does not keep the samples apart.
    """

    input_ids: torch.Tensor
    """[1, S] int64."""
    position_ids: torch.Tensor
    """[4, 1, S] int64: row 0 counts the tokens of each sample from 0, which is how every attention keeps the samples
    apart (masks, and the bounds of flash and varlen); rows 1 to 3 are the mRoPE positions of each sample."""
    mm_token_type_ids: torch.Tensor
    """[1, S] int64: 1 at image placeholders."""
    pixel_values: torch.Tensor
    """[P, 1176] float32: patches of all images of all samples in order."""
    image_grid_thw: torch.Tensor
    """[I, 3] int64: (time, rows, columns) of each image in patches."""
    labels: torch.Tensor
    """[1, S] int64: IGNORE_INDEX where unsupervised; not shifted."""
    answer_roles: torch.Tensor
    """[1, S] int64: ROLE_CODES at supervised tokens, 0 elsewhere."""
    sample_lengths: torch.Tensor
    """[N] int64: tokens of each sample; the rest of S is padding."""


class StandardDataCollator:
    """Pads samples to the longest one, on the right for training and on the left for generation."""

    def __init__(
        self,
        pad_token_id: int,
        *,
        pad_to_multiple_of: int = 1,
        side: Literal["left", "right"] = "right",
        merge_size: int = MERGE_SIZE,
    ) -> None:
        self._pad_id, self._multiple, self._side = pad_token_id, max(1, pad_to_multiple_of), side
        self._merge_size = merge_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        longest = max(len(s) for s in samples)
        width = -(-longest // self._multiple) * self._multiple

        def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([self._pad(row, width, value) for row in rows])

        batch = Batch(
            input_ids=pad([s.input_ids for s in samples], self._pad_id),
            attention_mask=pad([torch.ones_like(s.input_ids) for s in samples], 0),
            labels=pad([s.labels for s in samples], IGNORE_INDEX),
            mm_token_type_ids=pad([s.mm_token_type_ids for s in samples], 0),
            pixel_values=torch.cat([s.pixel_values for s in samples]),
            image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
            answer_roles=pad([_answer_roles(s) for s in samples], 0),
            **_student_fields(samples, self._pad_id),
        )
        if self._side == "right":
            positions = [mrope_positions(s.mm_token_type_ids, s.image_grid_thw, self._merge_size) for s in samples]
            batch["position_ids"] = torch.stack([self._pad(p, width, 0) for p in positions], dim=1)
        return batch

    def _pad(self, row: torch.Tensor, width: int, value: int) -> torch.Tensor:
        missing = width - row.shape[-1]
        sides = (missing, 0) if self._side == "left" else (0, missing)
        return torch.nn.functional.pad(row, sides, value=value)


class PackedDataCollator:
    """Joins samples that do not see each other into one row; the padding at its end counts as one more sample.

    Raises DataError for a sample, or a row, of more than max_total_length tokens.
    """

    def __init__(
        self, pad_token_id: int, *, max_total_length: int, pad_to_multiple_of: int = 1, merge_size: int = MERGE_SIZE
    ) -> None:
        self._pad_id, self._limit = pad_token_id, max_total_length
        self._multiple, self._merge_size = max(1, pad_to_multiple_of), merge_size

    def __call__(self, samples: Sequence[Sample]) -> PackedBatch:
        self._check(samples)
        missing = -sum(len(s) for s in samples) % self._multiple

        def join(rows: list[torch.Tensor], padding: int) -> torch.Tensor:
            return torch.cat([*rows, torch.full((missing,), padding)])[None]

        # The positions of the padding begin at 0 too, so that attention keeps it apart like any sample.
        positions = [_packed_positions(s, self._merge_size) for s in samples] + [torch.arange(missing).repeat(4, 1)]
        return PackedBatch(
            input_ids=join([s.input_ids for s in samples], self._pad_id),
            position_ids=torch.cat(positions, dim=1)[:, None],
            mm_token_type_ids=join([s.mm_token_type_ids for s in samples], 0),
            pixel_values=torch.cat([s.pixel_values for s in samples]),
            image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
            labels=join([s.labels for s in samples], IGNORE_INDEX),
            answer_roles=join([_answer_roles(s) for s in samples], 0),
            sample_lengths=torch.tensor([len(s) for s in samples]),
            **_student_fields(samples, self._pad_id),
        )

    def _check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            # The token before belongs to another sample, which must not be trained to predict this one.
            assert sample.labels[0] == IGNORE_INDEX, f"{sample.name}: the first token is supervised"
            if len(sample) > self._limit:
                raise DataError(
                    f"{sample.name}: {len(sample)} tokens but max_total_length is {self._limit}; raise it or lower "
                    "model_max_length"
                )
        if (total := sum(len(s) for s in samples)) > self._limit:
            names = ", ".join(s.name for s in samples)
            raise DataError(f"{names}: {total} tokens in one row but max_total_length is {self._limit}; pack fewer")


def _packed_positions(sample: Sample, merge_size: int) -> torch.Tensor:
    """[4, S] int64: index of each token in its sample, then mRoPE along time, height and width (S tokens)."""
    count = torch.arange(len(sample))[None]
    return torch.cat([count, mrope_positions(sample.mm_token_type_ids, sample.image_grid_thw, merge_size)])


def _answer_roles(sample: Sample) -> torch.Tensor:
    """[S] int64: ROLE_CODES of who answers at each supervised token, 0 elsewhere (S tokens)."""
    roles = torch.zeros_like(sample.input_ids)
    for span in sample.answers:
        roles[span.start : span.end] = ROLE_CODES[span.role]
    return roles


def _student_fields(samples: Sequence[Sample], pad_id: int) -> StudentFields:
    """The fields of a batch that the detection head uses."""
    images = [len(s.images) for s in samples]
    prompts = [s.input_ids[s.prompt] for s in samples]
    captions = [torch.tensor(caption) for s in samples for caption in s.captions]
    return StudentFields(
        student_images=torch.tensor([sum(images[:i]) + s.student_image for i, s in enumerate(samples)]),
        prompt_ids=pad_sequence(prompts, batch_first=True, padding_value=pad_id),
        prompt_mask=pad_sequence([torch.ones_like(p, dtype=torch.bool) for p in prompts], batch_first=True),
        boxes=[_normalised_boxes(s) for s in samples],
        caption_ids=pad_sequence(captions, batch_first=True, padding_value=IGNORE_INDEX)
        if captions
        else torch.zeros((0, 1), dtype=torch.int64),
        sample_names=[s.name for s in samples],
    )


def _normalised_boxes(sample: Sample) -> torch.Tensor:
    """[O, 4] float32: boxes of O objects, cxcywh in 0..1 of the student's first image."""
    corners = torch.tensor([o.bbox_2d for o in sample.objects], dtype=torch.float32).reshape(-1, 4)
    width, height = sample.image_size
    return to_centres(corners / torch.tensor([width, height, width, height]))
