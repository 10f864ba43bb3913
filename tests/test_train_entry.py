"""The training entry's checks, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bbu.config.domains import OWNERS
from bbu.config.read import load_config
from tests.models.qwen_3b import QWEN_3B

ROOT = Path(__file__).resolve().parents[1]


def train(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bbu.train", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [("base_flat",), ("base_flat_v2", "--use-new-config"), ("one_card_80gb",), ("one_card_40gb",), ("smoke",)],
)
def test_validate_only_accepts_the_shipped_configs(arguments: tuple[str, ...]):
    done = train("--config", *arguments, "--log_level", "INFO", "--log_verbose", "true", "--validate-only")
    assert done.returncode == 0 and f"{len(OWNERS)} keys" in done.stdout


def test_validate_only_says_what_is_missing_on_this_machine():
    done = train("--config", "base_flat", "--validate-only", "--set", "model_path=nowhere", "--set", "data_root=none")
    assert done.returncode == 0  # the config is valid, and may be meant for another machine
    lines = done.stderr.splitlines()
    expected = (
        "bbu.train: not on this machine (",
        "bbu.train: no memory is estimated: there is no config.json in nowhere",
    )
    assert all(line.startswith(expected) for line in lines)
    assert any("model_path nowhere: no such folder" in line for line in lines)


def test_validate_only_shows_the_memory_of_one_card_and_of_eight(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B), encoding="utf-8")
    done = train("--config", "base_flat", "--validate-only", "--set", f"model_path={tmp_path}")
    assert done.returncode == 0 and "1 card   8 cards" in done.stdout and "optimizer" in done.stdout, done.stdout


def test_what_print_config_prints_is_a_config(tmp_path: Path):
    done = train("--config", "smoke", "--set", "llm_lr=3e-4", "--print-config")
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout, encoding="utf-8")
    assert load_config(str(path)) == load_config("smoke", overrides=["llm_lr=3e-4"])


def test_deepspeed_comes_from_the_environment_and_the_command_line_wins():
    printed = train("--config", "smoke", "--print-config", BBU_DEEPSPEED_ENABLED="true", BBU_DEEPSPEED_CONFIG="z.json")
    values = yaml.safe_load(printed.stdout)
    assert values["deepspeed_enabled"] is True and values["deepspeed_config"] == "z.json"
    printed = train(
        "--config", "smoke", "--print-config", "--set", "deepspeed_enabled=false", BBU_DEEPSPEED_ENABLED="true"
    )
    assert yaml.safe_load(printed.stdout)["deepspeed_enabled"] is False


def test_a_refused_config_is_one_line_per_finding_without_traceback():
    done = train("--config", "smoke", "--set", "llm_rl=1", "--set", "seed=x", "--validate-only")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2 and all(line.startswith("error: ") for line in lines)
