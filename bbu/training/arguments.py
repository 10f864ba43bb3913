"""The run config in the terms of transformers' TrainingArguments."""

from __future__ import annotations

import importlib
import os
import socket
import sys

import torch
from transformers import TrainingArguments

from bbu.config.deepspeed import check_deepspeed, find_deepspeed_file
from bbu.config.flat import DirectConfig
from bbu.config.optimizers import missing_optimizer_package
from bbu.errors import ConfigError
from bbu.run.folder import RunFolder


def training_arguments(config: DirectConfig, run: RunFolder) -> TrainingArguments:
    """Translate the run config, and join the process group where the environment names other ranks.

    What is not named here keeps transformers' default or is this project's own: learning rates (ParameterManager),
    data loading, logs, the rotation of checkpoints.

    Raises:
        ConfigError: a combination that cannot train, or a DeepSpeed file that is missing or contradicts the config.
        ImportError: a package of the extra `train` is missing.
    """
    infra, gpu = config.infrastructure, torch.cuda.is_available()
    _check_precision(config)
    _check_optimizer(config)
    if infra.deepspeed_enabled:
        importlib.import_module("deepspeed")  # where it is missing, transformers would raise a TypeError
        check_deepspeed(config)
        _name_single_rank()
    try:
        arguments = _translate(config, run, gpu)
    except ValueError as error:
        raise ConfigError(f"{config.source}: {' '.join(str(error).split())[:300]}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: DataParallel would split packed rows
    if infra.deepspeed_enabled:
        _join_deepspeed(_resolve_backend(infra.distributed_backend, gpu))
    return arguments


def _translate(config: DirectConfig, run: RunFolder, gpu: bool) -> TrainingArguments:
    """Name each key by transformers' word for it."""
    training, infra = config.training, config.infrastructure
    return TrainingArguments(
        output_dir=str(run.root),
        num_train_epochs=training.num_train_epochs,
        max_steps=max(training.max_steps, 0) or -1,  # transformers takes 0 for a run without steps
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        weight_decay=training.weight_decay,
        optim=training.optim,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps or training.warmup_ratio,  # below 1 transformers reads a share of the steps
        bf16=training.bf16,
        fp16=training.fp16,
        tf32=config.model.tf32 if gpu else None,
        seed=training.seed,
        data_seed=training.data_seed,
        save_strategy=training.save_strategy,
        save_steps=training.save_steps,
        eval_strategy=training.eval_strategy,
        eval_steps=training.eval_steps,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide what GradientGuard must see
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not gpu,
        ddp_backend=_resolve_backend(infra.distributed_backend, gpu) if "RANK" in os.environ else None,
        ddp_timeout=infra.distributed_timeout_s,
        ddp_find_unused_parameters=False,  # the objective puts every parameter that trains into the graph
        deepspeed=str(find_deepspeed_file(infra.deepspeed_config)) if infra.deepspeed_enabled else None,
    )


def _check_precision(config: DirectConfig) -> None:
    """Refuse weights that a small step cannot change.

    bfloat16 keeps 8 bits: it rounds away an update below 0.4 % of a weight, and a usual learning rate makes such
    updates. DeepSpeed keeps a float32 copy of the weights for its optimizer; plain training does not. Low-rank adapters
    and the head beside them are float32, whatever the dtype of the frozen weights.
    """
    is_kept_in_float32 = config.infrastructure.deepspeed_enabled or config.training.lora_rank > 0
    if config.model.torch_dtype != "float32" and not is_kept_in_float32:
        raise ConfigError(
            f"{config.source}: torch_dtype {config.model.torch_dtype} without DeepSpeed would round most updates away; "
            "set torch_dtype to float32 (bf16: true still computes in bfloat16), enable DeepSpeed, or train adapters "
            "(lora_rank above 0)"
        )


def _check_optimizer(config: DirectConfig) -> None:
    """Refuse an optimizer whose package is missing now; transformers looks for it once the model is loaded."""
    name = config.training.optim
    if package := missing_optimizer_package(name):
        raise ConfigError(
            f"{config.source}: optim {name} needs the Python package {package}, which is not installed in "
            f"{sys.executable}; install it, or set optim to adamw_torch"
        )


def _name_single_rank() -> None:
    """Describe one rank to DeepSpeed where no launcher named any: it would look for MPI."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(single)


def _join_deepspeed(backend: str) -> None:
    """Join the process group before a model is loaded: ZeRO-3 partitions the weights while they are read."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _resolve_backend(name: str, gpu: bool) -> str:
    """Turn auto into nccl where there are GPUs, else into gloo."""
    return ("nccl" if gpu else "gloo") if name == "auto" else name
