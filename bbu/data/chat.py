"""Writes conversations as tokens in Qwen2.5-VL's chat format, with image placeholders, and marks the answers.

The format is the one that Qwen2.5-VL was trained on (ChatML: `<|im_start|>role\\n…<|im_end|>\\n`, an image as
`<|vision_start|><|image_pad|>…<|vision_end|>`). Each part is tokenised separately and appended, so that the spans of
answers and images are noted while they are written and need not be searched for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bbu.data.types import Span
from bbu.errors import DataError, ModelError
from bbu.schema import IGNORE_INDEX, BBUObject, Role

_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
_VISION_START, _VISION_END, _IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"

_TEXTS_AT_ONCE = 2000
"""Texts that are tokenised together; the ids of more would only take memory."""


@dataclass(frozen=True)
class Turn:
    """A question about images, and its answer."""

    role: Role
    """Whose turn it is: a worked example's (teacher) or the sample's own (student)."""
    placeholders: tuple[int, ...]
    """Number of `<|image_pad|>` tokens of each image."""
    instruction: str
    """The text after the images."""
    answer: str | None
    """The text to learn; None leaves the turn open for generation."""


@dataclass
class Chat:
    """A conversation while it is written."""

    ids: list[int] = field(default_factory=list)
    """Token ids."""
    answers: list[Span] = field(default_factory=list)
    """Tokens of each answer, its `<|im_end|>` included."""
    images: list[Span] = field(default_factory=list)
    """Placeholder tokens of each image."""

    def labels(self) -> torch.Tensor:
        """[S] int64: the token inside answers, IGNORE_INDEX elsewhere (S tokens)."""
        ids = torch.tensor(self.ids)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for span in self.answers:
            labels[span.start : span.end] = ids[span.start : span.end]
        return labels

    def mm_token_type_ids(self) -> torch.Tensor:
        """[S] int64: 1 at image placeholders, 0 at text (S tokens)."""
        types = torch.zeros(len(self.ids), dtype=torch.int64)
        for span in self.images:
            types[span.start : span.end] = 1
        return types


class ChatBuilder:
    """Writes conversations with one tokenizer; raises ModelError if the tokenizer lacks Qwen's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._image_pad = _special_id(tokenizer, _IMAGE_PAD)
        for token in (_IM_START, _IM_END, _VISION_START, _VISION_END):
            _special_id(tokenizer, token)

    def build(self, system: str, turns: Iterable[Turn]) -> Chat:
        """Write a conversation: the system prompt, then every turn in order."""
        chat = Chat()
        self._write(chat, f"{_IM_START}system\n", trusted=True)
        self._write(chat, system)
        self._write(chat, f"{_IM_END}\n", trusted=True)
        for turn in turns:
            self._write_question(chat, turn)
            self._write_answer(chat, turn)
        return chat

    def caption(self, desc: str) -> tuple[int, ...]:
        """Token ids of a description as the caption branch learns to write it, the end token included."""
        ids = self._tokenizer.encode(desc, add_special_tokens=False, split_special_tokens=True)
        return (*ids, _special_id(self._tokenizer, _IM_END))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, as answers and descriptions are written; many at once, on all cores."""
        counts: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[start : start + _TEXTS_AT_ONCE])
            encoded = self._tokenizer(
                part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
            )
            counts += map(len, encoded["input_ids"])  # type: ignore[arg-type]
        return counts

    def describe_tokenizer(self) -> str:
        """All that the tokenizer makes of a text depends on: vocabulary, merges and rules, as JSON."""
        backend: Any = self._tokenizer
        return backend.backend_tokenizer.to_str()

    def _write_question(self, chat: Chat, turn: Turn) -> None:
        self._write(chat, f"{_IM_START}user\n", trusted=True)
        for count in turn.placeholders:
            self._write(chat, _VISION_START, trusted=True)
            start = len(chat.ids)
            chat.ids += [self._image_pad] * count
            chat.images.append(Span(start, start + count, turn.role))
            self._write(chat, _VISION_END, trusted=True)
        self._write(chat, turn.instruction)
        self._write(chat, f"{_IM_END}\n{_IM_START}assistant\n", trusted=True)

    def _write_answer(self, chat: Chat, turn: Turn) -> None:
        if turn.answer is None:
            return
        start = len(chat.ids)
        self._write(chat, turn.answer)
        self._write(chat, _IM_END, trusted=True)
        chat.answers.append(Span(start, len(chat.ids), turn.role))
        self._write(chat, "\n", trusted=True)

    def _write(self, chat: Chat, text: str, trusted: bool = False) -> None:
        """Append text. Special tokens are recognised in trusted text (our own) only, never in labels or prompts."""
        chat.ids += self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not trusted)


def format_answer(objects: Sequence[BBUObject]) -> str:
    """Write the answer that the model learns: a JSON list, with boxes rounded to whole pixels.

    A box is rounded outwards (floor, ceil) where rounding to the nearest pixel would make it empty.
    """
    items = [{"bbox_2d": _whole_pixels(o), "desc": o.desc} for o in objects]
    return json.dumps(items, ensure_ascii=False)


def reading_order(objects: Iterable[BBUObject]) -> tuple[BBUObject, ...]:
    """Sort objects from top to bottom, then from left to right, by the top-left corner.

    Equal corners are ordered by the other corner, then by the description.
    """
    return tuple(sorted(objects, key=lambda o: (o.bbox_2d[1], o.bbox_2d[0], o.bbox_2d, o.desc)))


def check_placeholders(chat: Chat, grid: torch.Tensor, patches: int, merge_size: int, name: str) -> None:
    """Refuse a conversation whose placeholders do not match its images.

    Args:
        chat: the conversation.
        grid: [I, 3] int64, (time, rows, columns) of each of I images in patches.
        patches: number of rows of pixel_values.
        merge_size: a square of merge_size x merge_size patches becomes one placeholder.
        name: of the sample, for messages.

    Raises:
        DataError: names the sample and the image.
    """
    if len(chat.images) != len(grid):
        raise DataError(f"{name}: {len(chat.images)} images in the text but {len(grid)} in pixels")
    if int(grid.prod(-1).sum()) != patches:
        raise DataError(f"{name}: image_grid_thw {grid.tolist()} does not cover {patches} patches of pixel_values")
    for number, (span, cells) in enumerate(zip(chat.images, grid.prod(-1).tolist(), strict=True)):
        if (span.end - span.start) * merge_size**2 != cells:
            raise DataError(
                f"{name}: image {number} takes {cells // merge_size**2} placeholders but the text has "
                f"{span.end - span.start}; min_pixels and max_pixels must be the same on both sides"
            )


def _whole_pixels(item: BBUObject) -> list[int]:
    x1, y1, x2, y2 = item.bbox_2d
    (x1, x2), (y1, y2) = _round_pair(x1, x2), _round_pair(y1, y2)
    return [x1, y1, x2, y2]


def _round_pair(low: float, high: float) -> tuple[int, int]:
    """Round one side of a box without making it empty."""
    if round(low) < round(high):
        return round(low), round(high)
    return int(low // 1), int(-(-high // 1))


def _special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"tokenizer {tokenizer.name_or_path} lacks {token}; use the tokenizer of a Qwen2.5-VL")
    return ids[0]
