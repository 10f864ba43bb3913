"""What the GPU benchmark trains: Qwen2.5-VL in any size with random weights, and samples of any size."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bbu.config.domains import DetectionConfig
from bbu.data.types import Sample, Span
from bbu.models.attention import register_text_attention
from bbu.models.detection_head import HeadSpec
from bbu.models.qwen import BBUModel
from bbu.resize import MERGE_SIZE, PATCH_SIZE
from bbu.run.folder import HEAD_KEY
from bbu.schema import IGNORE_INDEX, BBUObject

TEXT_HEAD, VISION_HEAD = 128, 80
"""Widths of the real model's attention heads, which every size here has too."""
PATCH_VALUES = 3 * 2 * PATCH_SIZE**2
"""Values of a patch: colours, frames, pixels."""


@dataclass(frozen=True)
class ModelSize:
    """Depths and widths of a Qwen2.5-VL; the text model's width is 128 times its heads, the vision tower's 80 times."""

    text_layers: int
    text_heads: int
    key_heads: int
    """Heads of keys and values in the text model."""
    text_ffn: int
    vocabulary: int
    """Tokens, special ones included."""
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    full_layers: tuple[int, ...]
    """Vision layers that attend over the whole image; the others attend within windows."""

    @property
    def image_token(self) -> int:
        """The placeholder of an image; text has ids below it."""
        return self.vocabulary - 4


QWEN_3B = ModelSize(36, 16, 2, 11008, 151936, 32, 16, 3420, (7, 15, 23, 31))
"""Qwen2.5-VL-3B-Instruct, as its config.json has it."""


@dataclass(frozen=True)
class RowSize:
    """The samples of one packed row: a worked example and a question each, but for the last, which has no example."""

    grid: tuple[int, int]
    """(rows, columns) of each image in patches."""
    objects: tuple[int, ...]
    """Objects in each image, for worked examples and questions in turn; their number is odd."""
    object_tokens: int
    """Tokens of an object in the answer; the real tokenizer's answers take 42."""
    prompt_tokens: int
    """Tokens of text before each answer."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        image = self.grid[0] * self.grid[1] // MERGE_SIZE**2
        return sum(image + self.prompt_tokens + count * self.object_tokens + 1 for count in self.objects)

    @property
    def samples(self) -> list[tuple[int, ...]]:
        """Objects in the images of each sample."""
        return [self.objects[start : start + 2] for start in range(0, len(self.objects), 2)]


ROW_8192 = RowSize((40, 50), (2, 4, 3, 8, 1, 5, 4, 6, 3), 42, 241)
"""8,190 tokens with 18,000 patches in five samples: objects as in the median photo (4), with the real spread."""


def build_config(size: ModelSize, detection: DetectionConfig | None = None) -> Qwen2_5_VLConfig:
    """The config of a model, with a detection head if that is enabled."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary, "hidden_size": size.text_heads * TEXT_HEAD,
            "intermediate_size": size.text_ffn, "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads, "num_key_value_heads": size.key_heads,
            "max_position_embeddings": 128000, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": size.vision_layers, "hidden_size": size.vision_heads * VISION_HEAD,
            "intermediate_size": size.vision_ffn, "num_heads": size.vision_heads, "window_size": 112,
            "out_hidden_size": size.text_heads * TEXT_HEAD, "fullatt_block_indexes": list(size.full_layers),
        },
        image_token_id=size.image_token,
        video_token_id=size.image_token + 1,
        vision_start_token_id=size.image_token + 2,
        vision_end_token_id=size.image_token + 3,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.use_cache = False
    if detection is not None and detection.detection_enabled:
        setattr(config, HEAD_KEY, HeadSpec.from_config(detection).as_dict())
    return config


def build_model(
    kind: type[BBUModel] | type[Qwen2_5_VLForConditionalGeneration],
    config: Qwen2_5_VLConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: tuple[str, str],
) -> Any:
    """Build a model with random weights on a device, ready for training; a seed gives the same weights each time.

    Args:
        kind: ours or the stock class.
        config: from `build_config`.
        device: where the weights are drawn; they never exist elsewhere.
        dtype: of the weights.
        attention: implementations of the text model and of the vision tower.
    """
    torch.manual_seed(0)
    name: Any = attention[0]
    text = register_text_attention(name) if issubclass(kind, BBUModel) else name
    implementations = {"text_config": text, "vision_config": attention[1]}
    with device:
        model: Any = kind._from_config(config, dtype=dtype, attn_implementation=implementations)
    if getattr(model, "detection_head", None) is not None:
        model.detection_head.reset_parameters()
    return model.train()


def make_samples(row: RowSize, size: ModelSize) -> list[Sample]:
    """Draw the samples of a row: random tokens, patches and boxes; the same ones each time."""
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    return [
        _make_sample(f"sample {number}", objects, row, size, generator, draw)
        for number, objects in enumerate(row.samples)
    ]


def move_batch(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Move a batch to a device; its patches become `dtype`, the dtype of the model's weights."""
    moved: Any = send_to_device(dict(batch), device, non_blocking=True)
    if dtype is not None:
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
    return moved


def _make_sample(
    name: str, objects: Sequence[int], row: RowSize, size: ModelSize, generator: torch.Generator, draw: random.Random
) -> Sample:
    """objects: number of objects in each of the sample's images; the last image is the student's."""
    rows, columns = row.grid
    placeholders = rows * columns // MERGE_SIZE**2
    ids: list[int] = []
    answers, images = [], []
    for turn, count in enumerate(objects):
        role = "student" if turn == len(objects) - 1 else "teacher"
        images.append(Span(len(ids) + 1, len(ids) + 1 + placeholders, role))
        ids += [size.image_token + 2, *[size.image_token] * placeholders, size.image_token + 3]
        ids += _draw_tokens(row.prompt_tokens - 2, size, draw)
        answers.append(Span(len(ids), len(ids) + count * row.object_tokens + 1, role))
        ids += _draw_tokens(count * row.object_tokens + 1, size, draw)
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for span in answers:
        labels[span.start : span.end] = input_ids[span.start : span.end]
    patches = len(objects) * rows * columns
    return Sample(
        name=name,
        input_ids=input_ids,
        labels=labels,
        mm_token_type_ids=(input_ids == size.image_token).long(),
        pixel_values=torch.randn(patches, PATCH_VALUES, generator=generator),
        image_grid_thw=torch.tensor([[1, rows, columns]] * len(objects)),
        answers=tuple(answers),
        images=tuple(images),
        objects=tuple(_draw_objects(objects[-1], rows, columns, draw)),
        captions=tuple(tuple(_draw_tokens(12, size, draw)) for _ in range(objects[-1])),
        image_size=(columns * PATCH_SIZE, rows * PATCH_SIZE),
    )


def _draw_tokens(count: int, size: ModelSize, draw: random.Random) -> list[int]:
    return draw.choices(range(size.image_token), k=count)


def _draw_objects(count: int, rows: int, columns: int, draw: random.Random) -> Iterable[BBUObject]:
    """Objects within an image of these patches, a fifth to a third of it wide and high."""
    for _ in range(count):
        shares = [draw.uniform(0, 0.6), draw.uniform(0, 0.6)]
        shares += [share + draw.uniform(0.2, 0.33) for share in shares]
        x1, y1, x2, y2 = (s * side * PATCH_SIZE for s, side in zip(shares, (columns, rows) * 2, strict=True))
        yield BBUObject((x1, y1, x2, y2), "part")
