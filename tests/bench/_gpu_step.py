"""One training step of a packed row beside a stock step on the same samples: speed, memory, waits of the host.

The stock step is what `transformers.Trainer` computes: a padded batch, labels handed to the model, logits of every
token. Both use bfloat16 weights and AdamW on them (8 bytes a parameter), and the same random weights.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.flat import DirectConfig
from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.data.types import Sample
from bbu.models.dimensions import ModelDimensions
from bbu.models.qwen import MODEL_INPUTS, BBUModel
from bbu.training.flops import measure_work, peak_flops, training_flops
from bbu.training.loss_manager import LossManager, global_counts
from bbu.training.memory import estimate_memory
from bbu.training.objective import Objective, PlannedCollator
from tests.bench._gpu_model import ModelSize, build_config, build_model, move_batch
from tests.bench._results import Row
from tests.host_waits import host_waits


@dataclass(frozen=True)
class Step:
    """Measured steps of one model."""

    seconds: float
    """Of the fastest step: forward, backward and optimizer."""
    peak_bytes: int
    """Most memory of tensors on the GPU during a step; 0 on a CPU."""
    waits: Counter[str] = field(default_factory=Counter)
    """Waits of the host in the forward and backward pass, by the place that waits; on a CPU, for a faked GPU."""
    loss: float = 0.0


@dataclass(frozen=True)
class StepCase:
    """What is measured: a model, its samples, and how often."""

    config: DirectConfig
    """Run config: losses, head, checkpointing."""
    size: ModelSize
    samples: list[Sample]
    our_attention: tuple[str, str]
    """Of the text model and of the vision tower."""
    stock_attention: tuple[str, str]
    repeats: int
    dtype: torch.dtype = torch.bfloat16
    """Of the weights."""


def measure_our_step(case: StepCase, device: torch.device) -> Step | None:
    """Measure our step: a packed row, logits of supervised tokens, the head if enabled; None if out of memory."""
    config, vision_config = case.config, build_config(case.size).vision_config
    collate = PlannedCollator(PackedDataCollator(0, max_total_length=1 << 20, pad_to_multiple_of=8), vision_config)
    batch = collate(case.samples)
    objective = Objective(config.detection, config.model.logits_chunk_size)
    manager = LossManager(config.training, config.detection, device)
    counts = global_counts(objective.counts([batch]))

    def prepare() -> _Trainee:
        model_config = build_config(case.size, config.detection)
        model = build_model(BBUModel, model_config, device, case.dtype, case.our_attention)
        inputs = move_batch(batch, device, case.dtype)
        return _Trainee(model, inputs, lambda: manager.objective(objective.losses(model, inputs), counts))

    return none_if_out_of_memory(lambda: _measure(prepare(), device, case))


def measure_stock_step(case: StepCase, device: torch.device) -> Step | None:
    """Measure the stock step on the same samples; None if out of memory."""
    batch = StandardDataCollator(0)(case.samples)

    def prepare() -> _Trainee:
        kind, model_config = Qwen2_5_VLForConditionalGeneration, build_config(case.size)
        model = build_model(kind, model_config, device, case.dtype, case.stock_attention)
        inputs = move_batch(batch, device, case.dtype)
        arguments = {name: inputs[name] for name in (*MODEL_INPUTS, "labels") if name in inputs}
        return _Trainee(model, inputs, lambda: model(**arguments, use_cache=False).loss)

    return none_if_out_of_memory(lambda: _measure(prepare(), device, case))


@dataclass(frozen=True)
class _Trainee:
    """A model with its batch and its loss."""

    model: Any
    inputs: Mapping[str, Any]
    """The batch on the device."""
    loss: Callable[[], torch.Tensor]


def _measure(trainee: _Trainee, device: torch.device, case: StepCase) -> Step:
    model = trainee.model
    if case.config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    losses: list[torch.Tensor] = []

    def backward() -> None:
        value = trainee.loss()
        value.backward()
        losses.append(value.detach())

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the first one makes the optimizer's states, and chooses kernels
    reset_peak_memory(device)
    times = [_seconds_of(step, device) for _ in range(case.repeats)]
    peak = read_peak_memory(device)
    waits = Counter(wait.rpartition(": ")[0] for wait in host_waits(backward, model, dict(trainee.inputs)))
    return Step(min(times), peak, waits, float(losses[-1]))


def _seconds_of(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


# --- what only a GPU shows ---


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak of a GPU's memory from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peak_memory(device: torch.device) -> int:
    """Most bytes of tensors on a GPU since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def none_if_out_of_memory(measure: Callable[[], Step]) -> Step | None:
    """The result, or None where the GPU has too little memory, which is a result too."""
    step = None
    with suppress(torch.OutOfMemoryError):
        step = measure()
    gc.collect()  # after the block: the error held the frames, and with them the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return step


# --- rows ---


def step_rows(case: StepCase, device: torch.device, what: str, ours: Step | None, stock: Step | None) -> list[Row]:
    """Rows of speed, memory and waits of our step beside the stock one."""
    work = measure_work([PackedDataCollator(0, max_total_length=1 << 20)(case.samples)])
    flops, peak = training_flops(build_config(case.size), work), peak_flops(device)

    def speed(step: Step | None) -> str:
        if step is None:
            return "out of memory"
        share = f", MFU {flops / step.seconds / peak:.0%}" if peak else ""
        return f"{work.tokens / step.seconds:,.0f} tokens/s{share}"

    speedup = stock.seconds / ours.seconds if ours and stock else None
    return [
        Row(f"{what}: speed", speed(ours), f"stock, padded {speed(stock)}", speedup, "1.0x", _remark(ours)),
        _memory_row(what, ours, stock, estimate_peak(case)),
        Row(f"{what}: host waits", _waits(ours), f"stock {_waits(stock)}", None, "2", _sites(ours)),
    ]


def _memory_row(what: str, ours: Step | None, stock: Step | None, estimate: float | None) -> Row:
    ratio = stock.peak_bytes / ours.peak_bytes if ours and stock and ours.peak_bytes else None
    remark = ""
    if estimate is not None:
        share = f", {estimate / ours.peak_bytes:.0%} of the peak" if ours and ours.peak_bytes else ""
        remark = f"estimate {estimate / 2**30:.1f} GiB{share}"
    return Row(f"{what}: peak memory", _gibibytes(ours), f"stock {_gibibytes(stock)}", ratio, "1.0x", remark)


def _gibibytes(step: Step | None) -> str:
    if step is None:
        return "out of memory"
    return f"{step.peak_bytes / 2**30:.1f} GiB" if step.peak_bytes else "not measured on a CPU"


def _waits(step: Step | None) -> str:
    return str(step.waits.total()) if step else "out of memory"


def _sites(step: Step | None) -> str:
    return ", ".join(f"{count} at {site}" for site, count in step.waits.most_common(3)) if step else ""


def _remark(step: Step | None) -> str:
    return "WRONG: the loss is not finite" if step and step.loss != step.loss else ""


def estimate_peak(case: StepCase) -> float:
    """The peak in bytes that the project computes before a training starts.

    AdamW keeps both moments in the dtype of the weights. The project counts them in float32: it trains weights in
    bfloat16 under DeepSpeed alone, which keeps them so.
    """
    dimensions = ModelDimensions.from_config(build_config(case.size).to_dict())
    estimate = estimate_memory(case.config, dimensions, ranks=1)
    return estimate.total - estimate.states["optimizer"] * (1 - case.dtype.itemsize / 4)
