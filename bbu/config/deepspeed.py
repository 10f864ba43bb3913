"""The DeepSpeed JSON that a run config names: what it says, and what it may not say beside the run config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import InfrastructureConfig
from bbu.config.flat import DirectConfig
from bbu.config.read import CONFIG_DIR
from bbu.errors import ConfigError
from bbu.strict_json import read_json

_DEFAULT_BUCKET = 500_000_000
"""Elements of a bucket where the JSON names none; DeepSpeed's default."""


@dataclass(frozen=True)
class DeepSpeedPlan:
    """What a DeepSpeed JSON says of memory."""

    stage: int
    """Stage of ZeRO: 1 partitions the optimizer's state over the ranks, 2 the gradients too, 3 the weights too."""
    offloads_optimizer: bool
    """Whether the optimizer's state lies in the host's memory."""
    offloads_weights: bool
    """Whether the partitioned weights of stage 3 lie in the host's memory."""
    bucket_elements: int | None
    """Gradients that are reduced together; None where it is `auto`, the square of the model's width."""
    buckets: int
    """Buckets in use at once: two where communication overlaps with the backward pass."""


def deepspeed_plan(infra: InfrastructureConfig) -> DeepSpeedPlan:
    """Read what the DeepSpeed JSON says of memory.

    Raises:
        ConfigError: the file is missing, is not JSON, or names no stage.
    """
    path = find_deepspeed_file(infra.deepspeed_config)
    stage, section = _zero_section(path, _read_deepspeed_file(path))
    size = section.get("reduce_bucket_size", _DEFAULT_BUCKET)
    return DeepSpeedPlan(
        stage=stage,
        offloads_optimizer=_offload_device(section, "offload_optimizer") != "none",
        offloads_weights=stage == 3 and _offload_device(section, "offload_param") != "none",
        bucket_elements=int(size) if isinstance(size, int | float) else None,
        buckets=2 if section.get("overlap_comm") else 1,
    )


def check_deepspeed(config: DirectConfig) -> None:
    """Refuse what DeepSpeed would do instead of what the run config says, and what would leave ranks waiting.

    Raises:
        ConfigError: the first contradiction, or a file that is missing or is not JSON.
    """
    path = find_deepspeed_file(config.infrastructure.deepspeed_config)
    settings = _read_deepspeed_file(path)
    # DeepSpeed's own optimizer and schedule know one learning rate, and would ignore those of the five groups.
    if sections := [name for name in ("optimizer", "scheduler") if name in settings]:
        raise ConfigError(
            f"{path}: {' and '.join(sections)} would replace the learning rates of the run config; remove the section"
        )
    stage, section = _zero_section(path, settings)
    if _offload_device(section, "offload_optimizer") != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        # accelerate replaces the optimizer by DeepSpeedCPUAdam, whose steps call no hook.
        raise ConfigError(
            f"{path}: offload_optimizer would replace the run's optimizer by DeepSpeed's own, without its check for "
            "NaN and without gn/<group>; add zero_force_ds_cpu_optimizer: false at the top level"
        )
    if config.model.torch_dtype != "float32" and not (config.training.bf16 or config.training.fp16):
        raise ConfigError(
            f"{config.source}: torch_dtype {config.model.torch_dtype} with bf16 false and fp16 false: DeepSpeed takes "
            "weights below float32 under mixed precision alone; set bf16 to true"
        )
    if stage == 3:
        _check_stage_3(config, path, section)


def _check_stage_3(config: DirectConfig, path: Path, section: dict[str, Any]) -> None:
    if config.training.lora_rank:
        raise ConfigError(
            f"{config.source}: lora_rank {config.training.lora_rank} with ZeRO-3 is not supported: frozen weights need "
            "no partitioning to fit; use ZeRO-2 or no DeepSpeed"
        )
    if config.model.logits_chunk_size:
        # All ranks gather a layer's weights together, so all must call each layer equally often.
        raise ConfigError(
            f"{config.source}: logits_chunk_size {config.model.logits_chunk_size} with ZeRO-3: ranks with longer "
            "answers would call the language head more often than others; set it to 0 or use ZeRO-2"
        )
    if section.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            f"{path}: without stage3_gather_16bit_weights_on_model_save: true a checkpoint would hold no weights that "
            "others can load; add it to zero_optimization"
        )


def find_deepspeed_file(name: str) -> Path:
    """Look a path up as it is, then relative to the checkout, whatever folder the run was started in.

    Raises:
        ConfigError: there is no such file.
    """
    for path in (Path(name), CONFIG_DIR.parent / name):
        if path.is_file():
            return path.absolute()
    raise ConfigError(f"deepspeed_config {name}: no such file; see configs/deepspeed")


def _zero_section(path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The stage of ZeRO, 0 to 3, and the section that names it."""
    section = settings.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization must name a stage, 0 to 3; copy one of configs/deepspeed")
    return stage, section


def _offload_device(section: dict[str, Any], name: str) -> str:
    offload = section.get(name)
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def _read_deepspeed_file(path: Path) -> dict[str, Any]:
    return read_json(path, ConfigError, "correct it, or copy one of configs/deepspeed")
