"""The run folder: where each file of one run lies."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.errors import BBUError, CheckpointError, nearest_valid
from bbu.strict_json import read_json

_CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
"""A padded number (checkpoint-007) is no name of ours: `checkpoint_name(7)` would not find it."""
_NAMES_SHOWN = 10
"""Names of runs that a message lists."""
RUN_CONFIG = "run_config.yaml"
"""The resolved run config inside a checkpoint."""
HEAD_FOLDER = "detection_head"
"""The folder with a model's detection head, inside the model's folder. Many loaders take every *.safetensors that lies
beside config.json (vLLM, mlx-vlm), and refuse weights that the stock architecture lacks."""
HEAD_CONFIG, HEAD_WEIGHTS = "config.json", "model.safetensors"
"""The files in it: what the head is built from, and its weights."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of low-rank adapters, by peft's names: their settings, with the base model's folder, and their weights. A
checkpoint of adapters has no config.json: transformers would look for the base model's weights beside it."""
HEAD_KEY = "bbu_detection_head"
"""Where a model's config holds the description of its head in memory, and where config.json held it in checkpoints of
version 0.2.0 before the head had files of its own."""


def checkpoint_name(step: int) -> str:
    """Name the folder of a checkpoint."""
    return f"checkpoint-{step}"


def checkpoint_step(name: str) -> int | None:
    """Read the step from the name of a checkpoint's folder; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    `config.yaml provenance.json status.json jobs.jsonl checkpoint-{step}/ logs/ tensorboard/ eval/`
    """

    root: Path
    """the folder itself, `output-{run_name}`"""

    @classmethod
    def of(cls, output_root: str | Path, run_name: str) -> RunFolder:
        """The folder of a run by its two config fields; creates nothing."""
        return cls(Path(output_root) / f"output-{run_name}")

    @classmethod
    def existing(cls, name: str | Path) -> RunFolder:
        """The run that somebody named: its folder, or its name as `bbu.status` prints it, `smoke` or `runs/smoke`.

        Raises CheckpointError where there is none, with the nearest name.
        """
        folder = Path(os.path.realpath(name))  # Path.resolve() raises RuntimeError for links in a circle
        for path in (folder, folder.with_name(f"output-{folder.name}")) if folder.name else ():
            if cls(path).is_run:
                return cls(path)
        if checkpoint_step(folder.name) is not None and folder.is_dir():
            raise CheckpointError(f"{name}: not a run folder but a checkpoint of one; name the folder that it is in")
        names = [run.name for run in cls.all_in(folder.parent)]
        near = nearest_valid(folder.name.removeprefix("output-"), names)
        there = f"; there are {', '.join(names[:_NAMES_SHOWN])}" if names and not near else ""
        advice = near or there or "; name an output-{run_name} folder, or go to the folder that it is in"
        raise CheckpointError(f"{name}: not a run folder{advice}")

    @classmethod
    def all_in(cls, folder: Path) -> list[RunFolder]:
        """The run folders in a folder, by name; those that may not be entered too."""
        runs = (cls(Path(os.path.realpath(path))) for path in sorted(folder.glob("output-*")) if path.is_dir())
        return [run for run in runs if not os.access(run.root, os.X_OK) or run.is_run]

    @property
    def is_run(self) -> bool:
        """Whether a training was submitted, or has begun, or has failed to, in this folder."""
        # os.path, because Path.is_file() raises OSError for a name that is too long.
        return any(os.path.isfile(path) for path in (self.jobs, self.config, self.status))

    @property
    def name(self) -> str:
        """The run's name, without `output-`."""
        return self.root.name.removeprefix("output-")

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def leases(self) -> Path:
        return self.root / ".lease"

    def create(self) -> RunFolder:
        """Make the folder and its fixed subfolders; does nothing to what is there already."""
        for folder in (self.logs, self.tensorboard, self.eval):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def checkpoint(self, step: int) -> Path:
        return self.root / checkpoint_name(step)

    def evaluations(self, step: int) -> Path:
        """The folder with the evaluations of one checkpoint, which may be rotated away by now."""
        return self.eval / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, in ascending order; says nothing about their integrity."""
        return checkpoint_steps(self.root)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the subfolders that are named like a checkpoint, in ascending order."""
    # Not Path.is_dir, which raises where a rotten disk cannot say what an entry is.
    names = [path.name for path in folder.iterdir() if os.path.isdir(path)] if folder.is_dir() else []
    return sorted(step for name in names if (step := checkpoint_step(name)) is not None)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a model folder holds low-rank adapters of another folder's model instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def read_head_spec(folder: Path, error: type[BBUError]) -> dict[str, Any] | None:
    """Read what a model folder's detection head is built from.

    Args:
        folder: the model folder.
        error: the typed error that a damaged folder raises.

    Returns:
        The description, of the head's own folder or of an older checkpoint's config.json; None without a head.

    Raises:
        error: a file is missing or damaged.
    """
    advice = "copy the folder again"
    path = folder / HEAD_FOLDER / HEAD_CONFIG
    if path.parent.is_dir() and not path.is_file():
        raise error(f"{path}: no such file, although there is a folder for the detection head; {advice}")
    if path.is_file():
        return read_json(path, error, advice)
    if is_adapter_folder(folder):
        return None
    return read_json(folder / "config.json", error, advice).get(HEAD_KEY) or None
