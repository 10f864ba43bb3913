"""The run config as TrainingArguments: what is refused, and that no learning rate beside the groups' own matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, get_scheduler

from bbu.config.read import load_config
from bbu.errors import ConfigError
from bbu.run.folder import RunFolder
from bbu.training.arguments import training_arguments


def refusal(run: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as refused:
        training_arguments(load_config("smoke", overrides=overrides), RunFolder(run))
    return str(refused.value)


def deepspeed_file(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Overrides that train with these DeepSpeed settings."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return ["deepspeed_enabled=true", f"deepspeed_config={path}"]


def test_weights_that_would_round_updates_away_are_refused(tmp_path: Path):
    assert "would round most updates away" in refusal(tmp_path, "torch_dtype=bfloat16")


def test_an_optimizer_whose_package_is_missing_is_refused_before_the_model_is_loaded(tmp_path: Path):
    text = refusal(tmp_path, "optim=adamw_anyprecision")
    assert "needs the Python package torchdistx, which is not installed" in text and "optim to adamw_torch" in text


def test_a_chunked_language_head_is_refused_under_zero_3(tmp_path: Path):
    overrides = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 3}})
    assert "use ZeRO-2" in refusal(tmp_path, *overrides, "logits_chunk_size=64")


def test_adapters_under_zero_3_are_refused(tmp_path: Path):
    overrides = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 3}})
    assert "lora_rank 4 with ZeRO-3 is not supported" in refusal(tmp_path, *overrides, "lora_rank=4")


@pytest.mark.parametrize("gather", [{}, {"stage3_gather_16bit_weights_on_model_save": "auto"}], ids=["unset", "auto"])
def test_zero_3_must_gather_the_weights_for_a_checkpoint(tmp_path: Path, gather: dict):
    overrides = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 3} | gather})
    assert "would hold no weights" in refusal(tmp_path, *overrides)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_deepspeed_may_not_replace_the_learning_rates_of_the_groups(tmp_path: Path, section: str):
    """DeepSpeed's sections know one rate for all parameters."""
    overrides = deepspeed_file(tmp_path, {section: {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}})
    assert f"{section} would replace the learning rates" in refusal(tmp_path, *overrides)


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("force", [{}, {"zero_force_ds_cpu_optimizer": True}], ids=["unset", "true"])
def test_an_offloaded_optimizer_must_be_the_runs_own(tmp_path: Path, force: dict):
    """DeepSpeed's own calls no hook, so that NaN would pass and gn/<group> would be missing."""
    overrides = deepspeed_file(tmp_path, OFFLOAD | force)
    assert "add zero_force_ds_cpu_optimizer: false" in refusal(tmp_path, *overrides)


def test_deepspeed_takes_weights_below_float32_under_mixed_precision_alone(tmp_path: Path):
    overrides = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2}})
    assert "set bf16 to true" in refusal(tmp_path, *overrides, "torch_dtype=bfloat16")


def test_a_deepspeed_file_that_is_missing_or_broken_is_named(tmp_path: Path):
    assert "none.json: no such file" in refusal(tmp_path, "deepspeed_enabled=true", "deepspeed_config=none.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    overrides = ("deepspeed_enabled=true", f"deepspeed_config={tmp_path}/broken.json")
    assert "broken.json: not JSON" in refusal(tmp_path, *overrides)


def test_a_frozen_language_model_may_have_any_schedule(tmp_path: Path):
    """transformers' polynomial schedule reads the optimizer's default rate, which is not that of any group."""
    config = load_config("smoke", overrides=["llm_lr=0.0", "lr_scheduler_type=polynomial"])
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_arguments(config, RunFolder(tmp_path)))
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": config.vision_lr}]
    optimizer = optimizer_class(groups, **options)
    scheduler = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=10)
    assert scheduler.get_last_lr() == [config.vision_lr]
