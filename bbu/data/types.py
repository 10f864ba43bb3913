"""What the data room hands to training and inference: samples with their spans, and the batch's names.

Shapes: S tokens of a sequence, P ViT patches, I images, N objects, B samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bbu.schema import IGNORE_INDEX as IGNORE_INDEX  # the data room's users find them here
from bbu.schema import ROLE_CODES as ROLE_CODES
from bbu.schema import BBUObject, Role


@dataclass(frozen=True)
class Span:
    """Tokens start..end (end excluded) of a sequence, and whose they are."""

    start: int
    end: int
    role: Role


@dataclass(frozen=True)
class Sample:
    """One conversation: worked examples of teachers, then the student's.

    answers: supervised tokens (`<|im_end|>` included), one span per answered turn.
    images: placeholder tokens, one span per image, in the order of `image_grid_thw`.
    objects: the student's, boxes in pixels of the first student image as the model sees it.
    captions: token ids of each object's description, the end token included.
    """

    name: str
    input_ids: torch.Tensor
    """[S] int64"""
    labels: torch.Tensor
    """[S] int64, IGNORE_INDEX outside answers; not shifted"""
    mm_token_type_ids: torch.Tensor
    """[S] int64, 1 at image placeholders, else 0; mRoPE needs it"""
    pixel_values: torch.Tensor
    """[P, 1176] float32, the images' patches one after the other"""
    image_grid_thw: torch.Tensor
    """[I, 3] int64, (t, h, w) in patches"""
    answers: tuple[Span, ...]
    images: tuple[Span, ...]
    objects: tuple[BBUObject, ...]
    captions: tuple[tuple[int, ...], ...]
    image_size: tuple[int, int]
    """(width, height) in pixels of the first student image as the model sees it"""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def student_image(self) -> int:
        """Row of the student's first image in `image_grid_thw`."""
        return next(i for i, span in enumerate(self.images) if span.role == "student")

    @property
    def prompt(self) -> slice:
        """Tokens of the student's instruction: after its last image, before its answer (or the end)."""
        last = [span for span in self.images if span.role == "student"][-1]
        ends = [span.start for span in self.answers if span.role == "student"]
        return slice(last.end, ends[0] if ends else len(self))
