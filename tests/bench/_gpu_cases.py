"""What the GPU benchmark measures, in full on a GPU and tiny on a CPU: devices, sizes and the list of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from tests.bench._gpu_attention import FLASH, has_varlen, measure_attention, register_varlen_of_any_torch
from tests.bench._gpu_model import QWEN_3B, ROW_8192, ModelSize, RowSize, make_samples
from tests.bench._gpu_precision import measure_autocast
from tests.bench._gpu_step import Step, StepCase, measure_our_step, measure_stock_step, step_rows
from tests.bench._results import Row

Part = Callable[[], Sequence[Row]]


@dataclass(frozen=True)
class Scale:
    """The sizes of all parts."""

    attention: ModelSize
    attention_row: RowSize
    precision: ModelSize
    precision_row: RowSize
    step: ModelSize
    step_row: RowSize
    repeats: int
    """Measured steps, after a first one that is not."""
    dtype: torch.dtype = torch.bfloat16
    """Of the weights in a step."""
    overrides: tuple[str, ...] = ()
    """On top of base_flat."""


FULL = Scale(
    attention=ModelSize(1, 16, 2, 11008, 1024, 2, 16, 3420, (1,)),
    attention_row=ROW_8192,
    precision=ModelSize(4, 4, 2, 2048, 4096, 4, 4, 1024, (1, 3)),
    precision_row=RowSize((20, 30), (2, 4, 3, 8, 1), 42, 200),
    step=QWEN_3B,
    step_row=ROW_8192,
    repeats=5,
)
_TINY_ROW = RowSize((4, 10), (1, 2, 1, 3, 1), 6, 10)
TINY = Scale(
    attention=ModelSize(1, 4, 2, 256, 1024, 2, 2, 128, (1,)),
    attention_row=_TINY_ROW,
    precision=ModelSize(1, 2, 1, 128, 1024, 2, 2, 128, (1,)),
    precision_row=_TINY_ROW,
    step=ModelSize(1, 2, 1, 128, 1024, 2, 2, 128, (1,)),
    step_row=_TINY_ROW,
    repeats=1,
    dtype=torch.float32,  # convolutions in bfloat16 are slow on a CPU
    overrides=(
        "detection_num_queries=8", "detection_hidden_dim=32", "detection_num_layers=1", "detection_num_heads=2",
        "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_caption_layers=1",
    ),
)  # fmt: skip


def choose_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> Row:
    """The first row: what was measured on, and with what."""
    packages = ["torch", "transformers", *(["flash_attn"] if is_flash_attn_2_available() else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    if device.type != "cuda":
        return Row("device", "CPU form: tiny sizes, speed means nothing", "", None, "", versions)
    properties = torch.cuda.get_device_properties(device)
    return Row("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", "", None, "", versions)


def list_parts(device: torch.device, scale: Scale) -> Iterator[tuple[str, Part]]:
    """Name and function of each part, the quick ones first."""
    yield "attention", partial(_attention_rows, device, scale)
    yield "autocast", partial(_autocast_rows, device, scale)
    for checkpointing in (True, False):
        name = f"{scale.step_row.tokens:,} tokens, {'with' if checkpointing else 'without'} checkpointing"
        yield name, partial(_step_rows, name, device, scale, checkpointing)


def list_attentions(device: torch.device) -> list[str]:
    """Implementations that run on a device, the fastest last."""
    packages = [FLASH] if device.type == "cuda" and is_flash_attn_2_available() else []
    return ["sdpa", *(["varlen"] if has_varlen(device) else []), *packages]


def _attention_rows(device: torch.device, scale: Scale) -> list[Row]:
    if device.type == "cuda":
        register_varlen_of_any_torch()
        return measure_attention(device, scale.attention, scale.attention_row, list_attentions(device))
    from tests.models.stand_ins import registered_reference_kernel

    with registered_reference_kernel():
        return measure_attention(device, scale.attention, scale.attention_row, ["sdpa", "varlen"])


def _autocast_rows(device: torch.device, scale: Scale) -> list[Row]:
    dropout = ("detection_dropout=0.0", "detection_caption_dropout=0.0", "detection_denoising_queries=0")
    configs = [_load_config(scale, f"detection_enabled={head}", *dropout) for head in ("false", "true")]
    return [
        measure_autocast(device, scale.precision, scale.precision_row, config, ("sdpa", "sdpa")) for config in configs
    ]


def _step_rows(name: str, device: torch.device, scale: Scale, checkpointing: bool) -> list[Row]:
    """Our step without and with the head beside one stock step."""
    stock: Step | None = None
    rows: list[Row] = []
    for number, head in enumerate((False, True)):
        case = _step_case(device, scale, checkpointing, head)
        stock = measure_stock_step(case, device) if number == 0 else stock
        ours = measure_our_step(case, device)
        rows += step_rows(case, device, f"{name}, {'head' if head else 'no head'}", ours, stock)
    return rows


def _step_case(device: torch.device, scale: Scale, checkpointing: bool, head: bool) -> StepCase:
    names = list_attentions(device)
    best, stock = names[-1], FLASH if FLASH in names else "sdpa"
    if best == "varlen":
        register_varlen_of_any_torch()
    settings = {
        "gradient_checkpointing": checkpointing, "detection_enabled": head, "attn_implementation": best,
        "vision_attn_implementation": best,
    }  # fmt: skip
    config = _load_config(scale, *(f"{key}={str(value).lower()}" for key, value in settings.items()))
    return StepCase(config, scale.step, make_samples(scale.step_row, scale.step), (best, best), (stock, stock),
                    scale.repeats, scale.dtype)  # fmt: skip


def _load_config(scale: Scale, *overrides: str) -> DirectConfig:
    """The shipped config for weights in bfloat16 on one card, without DeepSpeed, which may not be installed."""
    plain = ("deepspeed_enabled=false", "torch_dtype=bfloat16", "optim=adamw_torch_fused")
    return load_config("base_flat", overrides=[*plain, *scale.overrides, *overrides])
