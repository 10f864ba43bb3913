"""The useful floating-point operations of a training step.

Counted as usual for model FLOPs utilisation (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B): two for each
multiply-add of a matrix product, the backward pass as two forward passes, nothing for recomputation or padding. The
vision tower counts; the detection head (below 1 % at 3B) and element-wise work do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

_PATCH_VALUES = 3 * 2 * 14 * 14
"""Inputs of the patch embedding: colours, frames, 14 x 14 pixels."""
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 peak, FLOPs a second, by a part of the device's name; from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Work:
    """What some batches hold; it is additive over micro-batches and ranks."""

    samples: float = 0.0
    tokens: float = 0.0
    """Real tokens, without padding."""
    computed_tokens: float = 0.0
    """Tokens with padding."""
    token_squares: float = 0.0
    """Sum of the squared sample lengths."""
    supervised: float = 0.0
    """Tokens whose logits are computed."""
    patches: float = 0.0
    """Patches of the vision tower."""
    patch_squares: float = 0.0
    """Sum of the squared image sizes in patches."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def as_list(self) -> list[float]:
        """The values in the order of the fields."""
        return [getattr(self, f.name) for f in fields(Work)]


def measure_work(batches: Sequence[Mapping[str, Any]]) -> Work:
    """Measure batches of either collator."""
    return sum((_measure_batch(batch) for batch in batches), Work())


def training_flops(config: Any, work: Work) -> float:
    """Count the forward and backward FLOPs of some work under Qwen2.5-VL's `config`."""
    return 3 * (_language_flops(config.text_config, work) + _vision_flops(config.vision_config, work))


def peak_flops(device: torch.device | str) -> float | None:
    """Look up the peak of a GPU, in FLOPs a second; None for one not in the table, or a CPU."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def _measure_batch(batch: Mapping[str, Any]) -> Work:
    # [N] real tokens of each sample; a packed row has no attention mask
    lengths = batch["attention_mask"].sum(-1) if "attention_mask" in batch else batch["sample_lengths"]
    lengths, images = lengths.double(), batch["image_grid_thw"].prod(-1).double()
    return Work(
        samples=len(batch["sample_names"]),
        tokens=float(lengths.sum()),
        computed_tokens=batch["input_ids"].numel(),
        token_squares=float(lengths.square().sum()),
        supervised=float((batch["answer_roles"] > 0).sum()),
        patches=float(images.sum()),
        patch_squares=float(images.square().sum()),
    )


def _language_flops(text: Any, work: Work) -> float:
    """Forward pass of the language model."""
    head = text.hidden_size // text.num_attention_heads
    # Queries and the output are hidden_size wide, keys and values have num_key_value_heads heads.
    attention = 2 * text.hidden_size * (text.hidden_size + head * text.num_key_value_heads)
    weights = text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)
    # Scores and their weighted sum of values, each 2 S^2 H for S tokens of width H, of which causality needs half.
    scores = text.num_hidden_layers * 2 * text.hidden_size * work.token_squares
    return 2 * weights * work.tokens + scores + 2 * text.hidden_size * text.vocab_size * work.supervised


def _vision_flops(vision: Any, work: Work) -> float:
    """Forward pass of the vision tower, patch embedding and merger included."""
    width, unit = vision.hidden_size, vision.spatial_merge_size**2
    layer = 4 * width**2 + 3 * width * vision.intermediate_size
    # The merger joins `unit` patches: two layers, the first as wide as its input.
    merger = unit * width**2 + width * vision.out_hidden_size
    weights = _PATCH_VALUES * width + vision.depth * layer + merger
    # A few layers attend over the whole image, all others within windows.
    full = len(vision.fullatt_block_indexes)
    window = (vision.window_size // vision.patch_size) ** 2
    scores = 4 * width * (full * work.patch_squares + (vision.depth - full) * window * work.patches)
    return 2 * weights * work.patches + scores
