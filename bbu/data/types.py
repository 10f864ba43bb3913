"""What the data package gives to training and inference: samples, and the spans of tokens in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bbu.schema import BBUObject, Role


@dataclass(frozen=True)
class Span:
    """A run of tokens in a conversation."""

    start: int
    """Index of the first token."""
    end: int
    """Index behind the last token."""
    role: Role
    """Whose tokens they are."""


@dataclass(frozen=True)
class Sample:
    """One conversation: worked examples of teachers, then the student's turn. S tokens, I images, P ViT patches."""

    name: str
    """Names the record in messages: file, index and image."""
    input_ids: torch.Tensor
    """[S] int64."""
    labels: torch.Tensor
    """[S] int64: the token inside answers, IGNORE_INDEX elsewhere; not shifted."""
    mm_token_type_ids: torch.Tensor
    """[S] int64: 1 at image placeholders, 0 elsewhere; without it the model's positions are not those of mRoPE."""
    pixel_values: torch.Tensor
    """[P, 1176] float32: the patches of all images, one image after the other."""
    image_grid_thw: torch.Tensor
    """[I, 3] int64: (time, rows, columns) of each image in patches."""
    answers: tuple[Span, ...]
    """Supervised tokens of each answered turn, `<|im_end|>` included."""
    images: tuple[Span, ...]
    """Placeholder tokens of each image, in the order of `image_grid_thw`."""
    objects: tuple[BBUObject, ...]
    """The student's objects; boxes in pixels of the student's first image as the model sees it."""
    captions: tuple[tuple[int, ...], ...]
    """Token ids of each object's description, the end token included."""
    image_size: tuple[int, int]
    """(width, height) in pixels of the student's first image as the model sees it."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def student_image(self) -> int:
        """Row of the student's first image in `image_grid_thw`."""
        return next(i for i, span in enumerate(self.images) if span.role == "student")

    @property
    def prompt(self) -> slice:
        """Tokens of the student's instruction: from its last image to its answer, or to the end without an answer."""
        last = [span for span in self.images if span.role == "student"][-1]
        ends = [span.start for span in self.answers if span.role == "student"]
        return slice(last.end, ends[0] if ends else len(self))
