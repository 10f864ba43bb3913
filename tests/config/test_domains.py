"""The keys of a run config: how many there are, that each is documented and read, and what each is used for."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from bbu.config.domains import DOMAINS, OWNERS, TYPES, Scheduler, keys_used_for
from bbu.config.kinds import value_problems
from bbu.config.read import CONFIG_DIR, load_config
from bbu.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[2] / "bbu"


def test_there_are_149_keys_and_each_belongs_to_one_domain():
    assert len(OWNERS) == sum(len(dataclasses.fields(cls)) for cls in DOMAINS.values()) == 149


def test_every_field_is_documented():
    tree = ast.parse((PACKAGE / "config/domains.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == len(DOMAINS)
    for cls in classes:
        body = cls.body[1:]
        for field, doc in zip(body[::2], body[1::2], strict=True):
            assert isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr), (cls.name, ast.unparse(field))


def test_every_key_is_read_by_code():
    """The checks and the domains themselves do not count."""
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    rates = {f"{group}_lr" for group in ("vision", "merger", "llm", "detection", "adapter")}  # getattr(f"{group}_lr")
    built = 'f"{group}_lr"' in code
    unread = [key for key in OWNERS if not (built and key in rates) and not re.search(rf"\.{key}\b", code)]
    assert not unread


def test_a_score_depends_on_what_decides_the_level_tables_and_not_on_the_batch_size():
    keys = keys_used_for("score")
    assert {"response_types", "label_hierarchy_file", "eval_prompt", "bf16", "min_pixels"} <= set(keys)
    assert not {"generation_batch_size", "train_prompt", "data_root", "run_name"} & set(keys)


def test_a_shard_depends_on_a_part_of_what_conversion_depends_on():
    shard, conversion = set(keys_used_for("shard")), set(keys_used_for("conversion"))
    assert shard < conversion and "vendor_dir" in shard and "val_ratio" in conversion - shard


def test_shipped_configs_state_every_key_and_flat_access_reads_it():
    for name in ("base_flat", "smoke"):
        config = load_config(name)
        stated = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
        assert stated.keys() == config.as_flat().keys()
        assert config.vision_lr == config.training.vision_lr


def test_the_names_of_optimizers_and_schedules_are_those_of_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    optimizers = {item.value for item in OptimizerNames}
    refused = {name for name in optimizers if value_problems(name, TYPES["optim"])}
    assert {name.partition("_")[0] for name in refused} == {"galore", "apollo", "lomo", "adalomo"}  # see optimizers.py
    needing_settings = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"}
    following_a_score = {"reduce_lr_on_plateau"}  # training computes none
    assert {*get_args(Scheduler), *needing_settings, *following_a_score} == {item.value for item in SchedulerType}


def test_an_unknown_optimizer_or_schedule_is_refused_with_the_nearest_valid_name():
    overrides = ["optim=AdamW", "lr_scheduler_type=cosin"]
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", overrides=overrides)
    optimizer, schedule = caught.value.findings
    assert "did you mean 'adamw_torch'?" in optimizer and "did you mean 'cosine'?" in schedule
