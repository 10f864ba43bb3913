"""The run folder: where each file of one run lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bbu.errors import CheckpointError

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
RUN_CONFIG = "run_config.yaml"
"""The resolved run config inside a checkpoint."""
HEAD_KEY = "bbu_detection_head"
"""Where a model folder's config.json describes its detection head."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    `config.yaml provenance.json status.json jobs.jsonl checkpoint-{step}/ logs/ tensorboard/ eval/`
    """

    root: Path

    @classmethod
    def of(cls, output_root: str | Path, run_name: str) -> RunFolder:
        """The folder of a run by its two config fields; creates nothing."""
        return cls(Path(output_root) / f"output-{run_name}")

    @classmethod
    def existing(cls, folder: str | Path) -> RunFolder:
        """The run folder at a path that somebody named. Raises CheckpointError where that is none."""
        run = cls(Path(folder).resolve())
        if not (run.jobs.is_file() or run.config.is_file()):
            raise CheckpointError(f"{folder}: not a run folder; name an output-{{run_name}} folder")
        return run

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
        return self.root / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending by number; says nothing about their integrity."""
        names = (CHECKPOINT_NAME.fullmatch(path.name) for path in self.root.glob("checkpoint-*") if path.is_dir())
        # a padded name (checkpoint-007) is not one of ours: checkpoint(7) would not find it
        return sorted(int(m[1]) for m in names if m and m[1] == str(int(m[1])))
