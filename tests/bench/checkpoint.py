"""How long a checkpoint of 1.2 GB makes training wait, beside the save of transformers' Trainer into a folder."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import Trainer

from bbu.config.read import load_config
from bbu.models import tiny
from bbu.run.checkpoints import verify
from bbu.training.coordinator import TrainingCoordinator
from bbu.training.preemption import StopFlag
from bbu.training.trainer import BBUTrainer
from tests.bench._results import Row
from tests.commands import make_demo

REPEATS = 7
WIDTH = 1024
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 8, "num_attention_heads": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}  # fmt: skip
"""A language model of such a size that weights and AdamW's two moments take 1.2 GB in float32."""
SETTINGS = ("max_steps=1", "save_steps=1000", "save_final=false", "save_total_limit=1", "eval_strategy=no")


@dataclass(frozen=True)
class Times:
    """Seconds of one save."""

    stall: float
    """for which the training loop stands still"""
    cpu: float
    """of CPU that the main thread spends in that time"""
    total: float
    """until the checkpoint is on disk and readers see it"""


def run() -> list[Row]:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, trained(Path(folder)) as trainer:
        ours, theirs = measure(trainer, Path(folder))
    ratio = min(t.stall for t in theirs) / min(t.stall for t in ours)
    pairs = sorted(theirs[i].stall / ours[i].stall for i in range(REPEATS))
    return [
        Row(
            f"saving {size_of(trainer) / 1e9:.1f} GB: training stands still",
            f"{describe([t.stall for t in ours])} s", f"Trainer {describe([t.stall for t in theirs])} s", ratio,
            "0.87x (1.15 times Trainer's time)",
            f"best of {REPEATS}, alternating, written pages in the page cache; ratio of the median pair "
            f"{pairs[REPEATS // 2]:.2f}x; CPU of the main thread {describe([t.cpu for t in ours])} s beside "
            f"{describe([t.cpu for t in theirs])} s; ours looks for NaN in weights and moments first",
        ),
        Row(
            "the same: until it is on disk, hashed and published",
            f"{describe([t.total for t in ours])} s", "Trainer neither flushes nor hashes", None, "",
            "in the background; a stop signal and the end of training wait for it",
        ),
    ]  # fmt: skip


def describe(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f}"


def size_of(trainer: BBUTrainer) -> int:
    """Bytes of weights and moments."""
    return 3 * sum(p.numel() * p.element_size() for p in trainer.model.parameters())


@contextmanager
def trained(root: Path) -> Iterator[BBUTrainer]:
    """A trainer after its first step, so that the optimizer has its state."""
    text, vision = tiny._text_config, tiny._vision_config
    with (
        patch.object(tiny, "_text_config", lambda *args: text(*args) | TEXT),
        patch.object(tiny, "_vision_config", lambda: vision() | {"out_hidden_size": WIDTH}),
    ):
        demo = make_demo(root / "demo", photos=12, seed=1)
    config = load_config("smoke", overrides=[*demo.settings, f"output_root={root}", *SETTINGS])
    trainers: list[BBUTrainer] = []
    train = BBUTrainer.train

    def keep(trainer: BBUTrainer, *args, **kwargs) -> None:
        trainers.append(trainer)
        train(trainer, *args, **kwargs)

    with patch.object(BBUTrainer, "train", keep):
        TrainingCoordinator(config, StopFlag(), {}).run()
    yield trainers[0]


def measure(trainer: BBUTrainer, root: Path) -> tuple[list[Times], list[Times]]:
    ours, theirs = [], []
    for repeat in range(REPEATS):
        trainer.state.global_step = 10 + repeat
        ours.append(time_ours(trainer))
        theirs.append(time_theirs(trainer, root / "theirs"))
    return ours, theirs


def time_ours(trainer: BBUTrainer) -> Times:
    began, cpu = time.perf_counter(), time.thread_time()
    trainer.save_step()
    stall, cpu = time.perf_counter() - began, time.thread_time() - cpu
    trainer.saver.await_publication()
    total = time.perf_counter() - began
    folder = trainer.publication.run.checkpoint(trainer.state.global_step)
    assert verify(folder).step == trainer.state.global_step
    return Times(stall, cpu, total)


def time_theirs(trainer: BBUTrainer, root: Path) -> Times:
    """Save the same trainer by the stock method alone."""
    root.mkdir()
    with patch.object(trainer, "_get_output_dir", lambda trial: str(root)):
        began, cpu = time.perf_counter(), time.thread_time()
        Trainer._save_checkpoint(trainer, trainer.model_wrapped, None)
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
    ours = torch.load(trainer.publication.run.checkpoint(trainer.state.global_step) / "optimizer.pt", weights_only=True)
    saved = torch.load(root / f"checkpoint-{trainer.state.global_step}" / "optimizer.pt", weights_only=True)
    assert ours["state"].keys() == saved["state"].keys()
    shutil.rmtree(root)
    return Times(seconds, cpu, seconds)
