"""Training, evals and inference set torch up alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from bbu.config.read import load_config
from bbu.inference.predictor import Qwen25VLInference
from bbu.models.torch_settings import prepare_torch
from bbu.run.folder import RUN_CONFIG, RunFolder
from tests.checkpoints import publishing
from tests.commands import Demo


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """The threads before the test, and after it."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_cpu_threads_hold_for_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = load_config("smoke", overrides=["cpu_threads=3"])
    prepare_torch(config.model, config.infrastructure)
    assert torch.get_num_threads() == 3


def test_zero_leaves_torchs_choice(threads: int):
    config = load_config("smoke", overrides=["cpu_threads=0"])
    prepare_torch(config.model, config.infrastructure)
    assert torch.get_num_threads() == threads


def test_inference_takes_the_threads_of_its_checkpoint(demo: Demo, tmp_path: Path):
    run = RunFolder.of(tmp_path, "smoke").create()
    config = load_config("smoke", overrides=[*demo.settings, "cpu_threads=3"])
    with publishing(run, 1) as staged:
        shutil.copytree(demo.root / "model", staged, dirs_exist_ok=True)
        (staged / RUN_CONFIG).write_text(yaml.safe_dump(config.as_flat(), allow_unicode=True), encoding="utf-8")
    Qwen25VLInference(run.checkpoint(1))
    assert torch.get_num_threads() == 3
