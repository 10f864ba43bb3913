"""Attention in bfloat16 held to float32: packed rows and windows, forward and backward, for each implementation.

The reference is eager attention in float32 on one sample at a time, which packs nothing and has no kernel of its own.
An error is the largest deviation divided by the largest value of the reference. The peer is eager attention in
bfloat16, one sample at a time: what bfloat16 costs without any kernel. A kernel may err up to twice as much, the rule
by which flash-attn tests its own kernels (Dao-AILab/flash-attention, tests/test_flash_attn.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2_5_VLConfig

from bbu.data.collators import PackedDataCollator
from bbu.data.types import Sample
from bbu.models.attention import register_varlen
from bbu.models.qwen import MODEL_INPUTS, BBUModel
from bbu.training.objective import PlannedCollator
from tests.bench._gpu_model import ModelSize, RowSize, build_config, build_model, make_samples, move_batch
from tests.bench._results import Row

FLASH = "flash_attention_2"
FLOAT32_LIMIT = 1e-4
"""Largest error in float32, where nothing but the order of sums differs."""
TIMES_EAGER = 2.0
"""How much larger than eager's an error in bfloat16 may be."""


@dataclass(frozen=True)
class Errors:
    """Largest deviations from the reference, as shares of the reference's largest value."""

    forward: float
    backward: float
    """Of the parameter whose gradient deviates most."""

    def __str__(self) -> str:
        return f"{self.forward:.1e} forward, {self.backward:.1e} backward"


@dataclass(frozen=True)
class _Result:
    """What a model computes of some samples."""

    outputs: list[torch.Tensor]
    """Of each sample, or of each image."""
    gradients: Mapping[str, torch.Tensor]
    """Of each parameter."""


_Compute = Callable[[BBUModel, Sequence[Sample], bool], _Result]
"""Takes a model, samples and whether to compute them together."""


def measure_attention(device: torch.device, size: ModelSize, row: RowSize, names: Sequence[str]) -> list[Row]:
    """Measure the errors of each implementation in both towers.

    Args:
        device: a GPU, or a CPU whose `varlen` is a stand-in.
        size: one text layer and two vision layers are enough.
        row: the samples.
        names: implementations that this machine has.
    """
    config, samples = build_config(size), make_samples(row, size)
    text = f"text, head 128, {size.text_heads}/{size.key_heads} heads"
    vision = f"vision, head 80, {size.vision_heads} heads"
    with exact_float32():
        return [
            *_compare(text, _compute_states, config, samples, device, names),
            *_compare(vision, _compute_features, config, samples, device, names),
        ]


def _compare(
    what: str,
    compute: _Compute,
    config: Qwen2_5_VLConfig,
    samples: Sequence[Sample],
    device: torch.device,
    names: Sequence[str],
) -> list[Row]:
    weights = build_model(BBUModel, config, device, torch.float32, ("eager", "eager")).state_dict()

    def result(name: str, dtype: torch.dtype, together: bool) -> _Result:
        model = build_model(BBUModel, config, device, dtype, (name, name))
        model.load_state_dict(weights)
        model.model.visual.patch_embed.requires_grad_(False)  # of no interest, and slow on a CPU
        return compute(model, samples, together)

    reference = result("eager", torch.float32, False)
    eager = measure_errors(result("eager", torch.bfloat16, False), reference)
    rows = [_float32_row(what, measure_errors(result("sdpa", torch.float32, True), reference))]
    return rows + [
        _bfloat16_row(what, name, measure_errors(result(name, torch.bfloat16, True), reference), eager)
        for name in names
    ]


def measure_errors(result: _Result, reference: _Result) -> Errors:
    """Compare outputs and gradients with those of the reference."""
    gradients = [relative_error(result.gradients[name], value) for name, value in reference.gradients.items()]
    return Errors(relative_error(torch.cat(result.outputs), torch.cat(reference.outputs)), max(gradients))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation divided by the largest value that is expected."""
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def _float32_row(what: str, errors: Errors) -> Row:
    is_wrong = max(errors.forward, errors.backward) > FLOAT32_LIMIT
    return Row(f"{what}: sdpa in float32", str(errors), "", None, f"{FLOAT32_LIMIT:.0e}", "WRONG" if is_wrong else "")


def _bfloat16_row(what: str, name: str, errors: Errors, eager: Errors) -> Row:
    ratio = min(eager.forward / errors.forward, eager.backward / errors.backward)
    remark = "WRONG" if ratio < 1 / TIMES_EAGER else ""
    return Row(f"{what}: {name}", str(errors), f"eager one by one {eager}", ratio, f"{1 / TIMES_EAGER}x", remark)


def _compute_states(model: BBUModel, samples: Sequence[Sample], together: bool) -> _Result:
    """The text model's last states, and the gradients of its layers; a row is planned as trainings plan it."""
    groups = [list(samples)] if together else [[sample] for sample in samples]
    collate: Any = PackedDataCollator(0, max_total_length=1 << 20)
    if together:
        collate = PlannedCollator(collate, model.config.vision_config)
    outputs: list[torch.Tensor] = []
    for group in groups:
        batch = move_batch(collate(group), _device_of(model), model.dtype)
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        states, _ = model(**inputs, layout=batch.get("layout"), read_states=lambda states, head: states[0])
        _weighted_sum(states, together, [len(sample) for sample in group], outputs).backward()
    return _Result(outputs, _gradients(model.model.language_model.layers))


def _compute_features(model: BBUModel, samples: Sequence[Sample], together: bool) -> _Result:
    """The vision tower's output, and the gradients of its layers."""
    visual: Any = model.model.visual
    grids = torch.cat([sample.image_grid_thw for sample in samples]).to(_device_of(model))
    patches = grids.prod(-1).tolist()
    pixels = torch.cat([sample.pixel_values for sample in samples]).to(grids.device, model.dtype)
    groups = [(pixels, grids)] if together else zip(pixels.split(patches), grids.split(1), strict=True)
    outputs: list[torch.Tensor] = []
    for values, grid in groups:
        features = visual(values, grid_thw=grid).pooler_output
        lengths = (grid.prod(-1) // visual.spatial_merge_unit).tolist()
        _weighted_sum(features, together, lengths, outputs).backward()
    return _Result(outputs, _gradients(visual.blocks))


def _weighted_sum(
    states: torch.Tensor, together: bool, lengths: Sequence[int], outputs: list[torch.Tensor]
) -> torch.Tensor:
    """A loss that weighs every value of each sample differently, alike for samples taken together or one by one.

    Args:
        states: [S, H] (S tokens of all samples, H width).
        together: whether these are all samples.
        lengths: tokens of each sample.
        outputs: the states of each sample are added to it, without their graph.
    """
    total = states.new_zeros((), dtype=torch.float32)
    for part in states.split(list(lengths)):
        generator = torch.Generator().manual_seed(len(outputs))
        weights = torch.randn(part.shape, generator=generator).to(states.device)
        outputs.append(part.detach().float())
        total = total + (part.float() * weights).sum()
    return total


def _gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None}


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 in full precision: cuDNN's convolutions would take TF32 by default."""
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def register_varlen_of_any_torch() -> None:
    """Register `varlen` with torch's own kernel. Up to torch 2.11 this has no `enable_gqa` and groups heads anyway."""
    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters
    register_varlen(varlen_attn if has_switch else partial(_without_switch, varlen_attn))


def _without_switch(kernel: Callable[..., Any], *args: Any, enable_gqa: bool, **options: Any) -> Any:
    return kernel(*args, **options)


def has_varlen(device: torch.device) -> bool:
    """Whether torch's varlen kernel runs on a device: an A100 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
