"""Conversations as tokens: Qwen2.5-VL's chat format, with image placeholders expanded and answers marked.

The text around the turns is the format Qwen2.5-VL was trained on (ChatML: `<|im_start|>role\\n…<|im_end|>\\n`,
images as `<|vision_start|><|image_pad|>…<|vision_end|>`). Segments are tokenised one by one and joined, so
the supervised spans are known by construction and never searched for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from bbu.data.types import IGNORE_INDEX, Role, Span
from bbu.errors import DataError, ModelError
from bbu.schema import BBUObject

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


@dataclass(frozen=True)
class Turn:
    """A question about images and its answer; `answer` None leaves the turn open for generation.

    placeholders: number of `<|image_pad|>` tokens of each image.
    """

    role: Role
    placeholders: tuple[int, ...]
    instruction: str
    answer: str | None


@dataclass
class Chat:
    """A conversation in the making: token ids, and the spans found while writing them."""

    ids: list[int] = field(default_factory=list)
    answers: list[Span] = field(default_factory=list)
    images: list[Span] = field(default_factory=list)

    def labels(self) -> torch.Tensor:
        """[S] int64: the token inside answers, IGNORE_INDEX elsewhere."""
        ids = torch.tensor(self.ids)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for span in self.answers:
            labels[span.start : span.end] = ids[span.start : span.end]
        return labels

    def mm_token_type_ids(self) -> torch.Tensor:
        """[S] int64: 1 at image placeholders, 0 at text."""
        types = torch.zeros(len(self.ids), dtype=torch.int64)
        for span in self.images:
            types[span.start : span.end] = 1
        return types


class ChatBuilder:
    """Writes conversations with one tokenizer; raises ModelError if that lacks Qwen's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._image_pad = _special_id(tokenizer, IMAGE_PAD)
        for token in (IM_START, IM_END, VISION_START, VISION_END):
            _special_id(tokenizer, token)

    def build(self, system: str, turns: Iterable[Turn]) -> Chat:
        """Tokenise a conversation: the system prompt, then every turn in order."""
        chat = Chat()
        self._write(chat, f"{IM_START}system\n", trusted=True)
        self._write(chat, system)
        self._write(chat, f"{IM_END}\n", trusted=True)
        for turn in turns:
            self._write_question(chat, turn)
            self._write_answer(chat, turn)
        return chat

    def caption(self, desc: str) -> tuple[int, ...]:
        """A description as the caption branch learns to write it, the end token included."""
        ids = self._tokenizer.encode(desc, add_special_tokens=False, split_special_tokens=True)
        return (*ids, _special_id(self._tokenizer, IM_END))

    def _write_question(self, chat: Chat, turn: Turn) -> None:
        self._write(chat, f"{IM_START}user\n", trusted=True)
        for count in turn.placeholders:
            self._write(chat, VISION_START, trusted=True)
            start = len(chat.ids)
            chat.ids += [self._image_pad] * count
            chat.images.append(Span(start, start + count, turn.role))
            self._write(chat, VISION_END, trusted=True)
        self._write(chat, turn.instruction)
        self._write(chat, f"{IM_END}\n{IM_START}assistant\n", trusted=True)

    def _write_answer(self, chat: Chat, turn: Turn) -> None:
        if turn.answer is None:
            return
        start = len(chat.ids)
        self._write(chat, turn.answer)
        self._write(chat, IM_END, trusted=True)
        chat.answers.append(Span(start, len(chat.ids), turn.role))
        self._write(chat, "\n", trusted=True)

    def _write(self, chat: Chat, text: str, trusted: bool = False) -> None:
        """Append text; special tokens are recognised in our own text only, never inside labels or prompts."""
        chat.ids += self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not trusted)


def format_answer(objects: Sequence[BBUObject]) -> str:
    """The answer the model learns to write: a JSON list, boxes rounded to whole pixels.

    A box is rounded outwards (floor, ceil) where rounding to nearest would leave it empty.
    """
    items = [{"bbox_2d": _whole_pixels(o), "desc": o.desc} for o in objects]
    return json.dumps(items, ensure_ascii=False)


def reading_order(objects: Iterable[BBUObject]) -> tuple[BBUObject, ...]:
    """Top to bottom, then left to right, by the top-left corner; ties by the other corner and the text."""
    return tuple(sorted(objects, key=lambda o: (o.bbox_2d[1], o.bbox_2d[0], o.bbox_2d, o.desc)))


def check_placeholders(chat: Chat, grid: torch.Tensor, patches: int, merge_size: int, name: str) -> None:
    """Refuse a conversation whose placeholders do not match its images.

    grid: [I, 3] patches per image; patches: rows of pixel_values. Raises DataError naming the sample.
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
    if round(low) < round(high):
        return round(low), round(high)
    return int(low // 1), int(-(-high // 1))


def _special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"tokenizer {tokenizer.name_or_path} lacks {token}; use the tokenizer of a Qwen2.5-VL")
    return ids[0]
