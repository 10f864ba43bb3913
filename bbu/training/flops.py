"""How much a batch asks of the hardware: the useful floating-point operations of a training step.

Counted as is usual for model FLOPs utilisation (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B): two for each
multiply-add of a matrix product, the backward pass as two forward ones, nothing for recomputation or padding. The
vision tower counts, the detection head (below 1 % at 3B) and element-wise work do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

PATCH_VALUES = 3 * 2 * 14 * 14
"""Inputs of the patch embedding: colours, two frames, 14 x 14 pixels."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 peak by a part of the device's name, from the makers' data sheets."""


@dataclass(frozen=True)
class Work:
    """What some batches hold; sums add up over micro-batches and ranks."""

    samples: float = 0.0
    tokens: float = 0.0
    computed_tokens: float = 0.0
    """with padding"""
    token_squares: float = 0.0
    """sum of squared sample lengths"""
    supervised: float = 0.0
    patches: float = 0.0
    patch_squares: float = 0.0
    """sum of squared image sizes in patches"""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def as_list(self) -> list[float]:
        return [getattr(self, f.name) for f in fields(Work)]


def work_of(batches: Sequence[Mapping[str, Any]]) -> Work:
    """Measure batches of either collator."""
    return sum((_work_of_one(batch) for batch in batches), Work())


def _work_of_one(batch: Mapping[str, Any]) -> Work:
    lengths, images = sample_lengths(batch), batch["image_grid_thw"].prod(-1).double()
    return Work(
        samples=len(batch["sample_names"]),
        tokens=float(lengths.sum()),
        computed_tokens=batch["input_ids"].numel(),
        token_squares=float(lengths.square().sum()),
        supervised=float((batch["answer_roles"] > 0).sum()),
        patches=float(images.sum()),
        patch_squares=float(images.square().sum()),
    )


def sample_lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    """[N] float64, real tokens of each sample."""
    lengths = batch["attention_mask"].sum(-1) if "attention_mask" in batch else batch["sample_lengths"]
    return lengths.double()


def training_flops(config: Any, work: Work) -> float:
    """Forward and backward of Qwen2.5-VL under its `config` for some work."""
    text, vision = config.text_config, config.vision_config
    return 3 * (_language(text, work) + _vision(vision, work))


def _language(text: Any, work: Work) -> float:
    head = text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * (text.hidden_size + head * text.num_key_value_heads)
    weights = text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)
    # Scores and their sum of values, each 2 S^2 H, of which causality needs half.
    scores = text.num_hidden_layers * 2 * text.hidden_size * work.token_squares
    return 2 * weights * work.tokens + scores + 2 * text.hidden_size * text.vocab_size * work.supervised


def _vision(vision: Any, work: Work) -> float:
    width, unit = vision.hidden_size, vision.spatial_merge_size**2
    layer = 4 * width**2 + 3 * width * vision.intermediate_size
    merger = unit * width**2 + width * vision.out_hidden_size
    weights = PATCH_VALUES * width + vision.depth * layer + merger
    whole = len(vision.fullatt_block_indexes)
    window = (vision.window_size // vision.patch_size) ** 2
    scores = 4 * width * (whole * work.patch_squares + (vision.depth - whole) * window * work.patches)
    return 2 * weights * work.patches + scores


def peak_flops(device: torch.device | str) -> float | None:
    """Peak of a GPU we know, None for another one or a CPU."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
