"""What a training does while its checkpoint is published in the background, and when that fails."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bbu.config.read import load_config
from bbu.errors import NonFiniteError
from bbu.run import publishing
from bbu.run.checkpoints import verify
from bbu.run.folder import RunFolder
from bbu.run.status import read_status
from bbu.training.coordinator import TrainingCoordinator
from bbu.training.preemption import StopFlag
from bbu.training.saving import CheckpointSaver, Publication, signal_notice
from bbu.training.trainer import BBUTrainer
from tests.commands import Demo

Train = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "smoke")


@pytest.fixture
def train(demo: Demo, tmp_path: Path) -> Train:
    """`train("max_steps=4")` trains the smoke config in this process."""

    def start(*settings: str) -> None:
        config = load_config("smoke", overrides=[*demo.settings, f"output_root={tmp_path}", *settings])
        TrainingCoordinator(config, StopFlag(), {}).run()

    return start


def test_training_continues_meanwhile_and_ends_only_when_the_checkpoint_is_there(
    train: Train, run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    disk, log, sync_tree, steps = threading.Event(), BBUTrainer.log, publishing._sync_tree, list[int]()

    def release_disk_later(trainer: BBUTrainer, *args: Any) -> None:
        if not disk.is_set():
            assert run.steps() == [] and read_status(run).checkpoint_step is None
            steps.append(trainer.state.global_step)
        if trainer.state.global_step == 3:
            disk.set()
        log(trainer, *args)

    monkeypatch.setattr(BBUTrainer, "log", release_disk_later)
    monkeypatch.setattr(publishing, "_sync_tree", lambda folder: (disk.wait(60), sync_tree(folder)))
    train("max_steps=4", "save_steps=2")
    assert steps == [1, 2, 3] and run.steps() == [2, 4]
    assert verify(run.checkpoint(2)).step == 2 and verify(run.checkpoint(4)).step == 4
    status = read_status(run)
    assert (status.phase, status.step, status.checkpoint_step) == ("completed", 4, 4)


def test_a_disk_that_is_full_in_the_background_ends_the_run_at_the_next_step(
    train: Train, run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    def refuse(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(publishing, "_sync_tree", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        train("max_steps=50", "save_steps=1")
    status = read_status(run)
    assert status.phase == "failed" and (status.step or 0) <= 2 and "no space left" in (status.reason or "")
    assert run.steps() == []


def test_a_run_that_fails_meanwhile_still_publishes_the_step_that_it_has_saved(
    train: Train, run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    compute_loss, sync_tree = BBUTrainer.compute_loss, publishing._sync_tree

    def poison(trainer: BBUTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return compute_loss(trainer, *args, **kwargs) * (float("nan") if trainer.state.global_step else 1.0)

    monkeypatch.setattr(BBUTrainer, "compute_loss", poison)
    monkeypatch.setattr(publishing, "_sync_tree", lambda folder: (time.sleep(2), sync_tree(folder)))
    with pytest.raises(NonFiniteError):
        train("max_steps=4", "save_steps=1")
    assert run.steps() == [1] and verify(run.checkpoint(1)).step == 1
    assert (read_status(run).phase, read_status(run).checkpoint_step) == ("failed", 1)


@pytest.mark.parametrize(("notice", "warns"), [(None, False), (600, False), (0, True)])
def test_a_save_that_takes_longer_than_the_notice_before_the_time_limit_is_warned_of_once(
    run: RunFolder, caplog: pytest.LogCaptureFixture, notice: int | None, warns: bool
):
    steps: list[int] = []
    publication = Publication(
        run.create(), load_config("smoke"), None, lambda staged: None, lambda: None, steps.append, notice
    )
    saver = CheckpointSaver(publication, 0, 1, lambda: None)
    caplog.set_level(logging.WARNING)
    for step in (1, 2):
        saver.save_step(step, lambda: None, lambda staged: (staged / "model.safetensors").write_bytes(b"weights"))
        saver.await_publication()
    assert steps == [1, 2]
    assert caplog.text.count("state signal_seconds: 60 or more") == warns


def test_the_notice_is_read_where_the_job_states_it():
    assert signal_notice({"BBU_SIGNAL_SECONDS": "600"}) == 600
    assert signal_notice({}) is None and signal_notice({"BBU_SIGNAL_SECONDS": "soon"}) is None
