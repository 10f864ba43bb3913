"""bfloat16 autocast held to float32 on a small model: the loss and the direction of its gradient.

Without a head both limits follow from bfloat16, which keeps 8 bits of a number (a relative error of 0.4 %). With a head
they are wide: it chooses patches to propose and matches queries to objects, and in a new head, whose scores are alike,
one rounding changes such a choice and with it a part of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.flat import DirectConfig
from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.models.qwen import MODEL_INPUTS, BBUModel
from bbu.training.loss_manager import LossManager, global_counts
from bbu.training.objective import Objective
from tests.bench._gpu_attention import exact_float32
from tests.bench._gpu_model import ModelSize, RowSize, build_config, build_model, make_samples, move_batch
from tests.bench._results import Row

LIMITS = {False: (0.01, 0.99), True: (0.05, 0.8)}
"""With a head or without: largest deviation of the loss, smallest cosine between the gradients of all parameters."""


@dataclass(frozen=True)
class _Deviation:
    """How far autocast is from float32."""

    loss: float
    """Relative."""
    cosine: float
    """Between the gradients of all parameters."""

    def __str__(self) -> str:
        return f"loss {self.loss:.2%} off, cosine of the gradients {self.cosine:.4f}"


def measure_autocast(
    device: torch.device, size: ModelSize, row: RowSize, config: DirectConfig, attention: tuple[str, str]
) -> Row:
    """Measure a step with float32 weights under autocast, and the same step without.

    Args:
        device: where it computes.
        size, row: model and samples.
        config: losses and head, without dropout.
        attention: one that computes in float32 too.
    """
    samples, detection = make_samples(row, size), config.detection
    packed = PackedDataCollator(0, max_total_length=1 << 20)(samples)
    objective = Objective(detection, config.model.logits_chunk_size)
    manager = LossManager(config.training, detection, device)
    counts = global_counts(objective.counts([packed]))
    batch = move_batch(packed, device)
    padded = move_batch(StandardDataCollator(0)(samples), device)
    inputs = {name: padded[name] for name in (*MODEL_INPUTS, "labels") if name in padded}
    with exact_float32():
        model_config = build_config(size, detection)
        model = build_model(BBUModel, model_config, device, torch.float32, attention)
        ours = _deviation(model, lambda: manager.objective(objective.losses(model, batch), counts), device)
        kind = Qwen2_5_VLForConditionalGeneration
        stock = build_model(kind, build_config(size), device, torch.float32, attention)
        peer = _deviation(stock, lambda: stock(**inputs, use_cache=False).loss, device)
    most, least = LIMITS[detection.detection_enabled]
    is_wrong = ours.loss > most or ours.cosine < least
    return Row(
        f"bfloat16 autocast beside float32, {'head' if detection.detection_enabled else 'no head'}", str(ours),
        f"stock {peer}", None, f"{most:.0%}, {least}", "WRONG" if is_wrong else "",
    )  # fmt: skip


def _deviation(model: Any, loss: Callable[[], torch.Tensor], device: torch.device) -> _Deviation:
    """Compare one loss and its gradient under autocast with those in float32."""
    values, gradients = [], []
    model.model.visual.patch_embed.requires_grad_(False)  # slow on a CPU
    for context in (nullcontext(), torch.autocast(device.type, torch.bfloat16)):
        model.zero_grad()
        with context:
            value = loss()
        value.backward()
        values.append(float(value.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    return _Deviation(abs(values[1] / values[0] - 1), float(cosine))
