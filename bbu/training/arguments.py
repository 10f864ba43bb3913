"""The run config in the terms of transformers' TrainingArguments."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import torch
from transformers import TrainingArguments

from bbu.config.flat import DirectConfig
from bbu.config.read import CONFIG_DIR
from bbu.errors import ConfigError
from bbu.run.folder import RunFolder


def training_arguments(config: DirectConfig, run: RunFolder) -> TrainingArguments:
    """Also joins the other ranks, where the environment names any; raises ConfigError for a missing DeepSpeed file.

    What is not named here keeps its stock value or is ours: checkpoints' rotation, logs, data loading, rates.
    """
    infra, gpu = config.infrastructure, torch.cuda.is_available()
    check_precision(config)
    if infra.deepspeed_enabled:
        check_deepspeed(config)
        stand_alone()
    try:
        arguments = _arguments(config, run, gpu)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{config.source}: {' '.join(str(error).split())[:300]}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: DataParallel would cut packed rows apart
    if infra.deepspeed_enabled:
        join_deepspeed(distributed_backend(infra.distributed_backend, gpu))
    return arguments


def _arguments(config: DirectConfig, run: RunFolder, gpu: bool) -> TrainingArguments:
    training, infra = config.training, config.infrastructure
    return TrainingArguments(
        output_dir=str(run.root),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.llm_lr,
        weight_decay=training.weight_decay,
        optim=training.optim,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps or training.warmup_ratio,  # below 1 it is a share of the steps
        bf16=training.bf16,
        fp16=training.fp16,
        tf32=config.model.tf32 if gpu else None,
        torch_compile=config.model.torch_compile,
        seed=training.seed,
        data_seed=training.data_seed,
        save_strategy=training.save_strategy,
        save_steps=training.save_steps,
        eval_strategy=training.eval_strategy,
        eval_steps=training.eval_steps,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_first_step=training.logging_first_step,
        logging_nan_inf_filter=False,  # it would hide what GradientGuard must see
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not gpu,
        ddp_backend=distributed_backend(infra.distributed_backend, gpu) if "RANK" in os.environ else None,
        ddp_timeout=infra.distributed_timeout_s,
        ddp_find_unused_parameters=infra.ddp_find_unused_parameters,
        deepspeed=str(deepspeed_file(infra.deepspeed_config)) if infra.deepspeed_enabled else None,
    )


def check_deepspeed(config: DirectConfig) -> None:
    """Refuse what would leave ZeRO-3's ranks waiting for each other: they must call every layer equally often."""
    settings = json.loads(deepspeed_file(config.infrastructure.deepspeed_config).read_text(encoding="utf-8"))
    if settings.get("zero_optimization", {}).get("stage") == 3 and config.model.logits_chunk_size:
        raise ConfigError(
            f"{config.source}: logits_chunk_size {config.model.logits_chunk_size} with ZeRO-3: ranks with longer "
            "answers would call the language head more often than others; set it to 0 or use ZeRO-2"
        )


def stand_alone() -> None:
    """One rank where no launcher named any: DeepSpeed would look for MPI."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def join_deepspeed(backend: str) -> None:
    """Tell DeepSpeed of the ranks before a model is loaded: ZeRO-3 cuts its weights up while they are read."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def check_precision(config: DirectConfig) -> None:
    """Refuse weights that a small step cannot change.

    bfloat16 keeps 8 bits: an update below 0.4 % of a weight is rounded away, and those of a usual learning rate are.
    DeepSpeed keeps a float32 copy of the weights for its optimizer; plain training does not.
    """
    if config.model.torch_dtype != "float32" and not config.infrastructure.deepspeed_enabled:
        raise ConfigError(
            f"{config.source}: torch_dtype {config.model.torch_dtype} without DeepSpeed would round most updates "
            "away; set torch_dtype to float32 (bf16: true still computes in bfloat16) or enable DeepSpeed"
        )


def distributed_backend(wanted: str, gpu: bool) -> str:
    """auto is nccl where there are GPUs, else gloo."""
    return ("nccl" if gpu else "gloo") if wanted == "auto" else wanted


def deepspeed_file(name: str) -> Path:
    """A path as it is, or relative to the checkout, whatever folder the run was started in."""
    for path in (Path(name), CONFIG_DIR.parent / name):
        if path.is_file():
            return path.absolute()
    raise ConfigError(f"deepspeed_config {name}: no such file; see configs/deepspeed")
