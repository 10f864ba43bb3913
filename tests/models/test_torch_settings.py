"""Training, evals and inference set torch up alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bbu.config.read import load_config
from bbu.models.torch_settings import prepare_torch


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
