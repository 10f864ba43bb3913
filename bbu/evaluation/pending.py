"""Where a run keeps its scores, and which of its checkpoints still lack one.

eval/ledger/                              who scores what (bbu.evaluation.ledger)
eval/checkpoint-{step}/{source}-{key}/             one evaluation: predictions.jsonl while it runs, metrics.json after
"""

from __future__ import annotations

from pathlib import Path

from bbu.evaluation.ledger import Ledger
from bbu.rundir import RunFolder

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
KEY_LETTERS = 12
"""Enough of a key to name a folder."""


def open_ledger(run: RunFolder, lease_seconds: float) -> Ledger:
    """The run's ledger; from then on rotation spares what has no score."""
    return Ledger(run.eval / "ledger", lease_seconds=lease_seconds)


def result_folder(run: RunFolder, step: int, source: str, key: str) -> Path:
    """Where the evaluation `key` of a checkpoint lies; source says what was asked, the answer or the head."""
    return run.eval / f"checkpoint-{step}" / f"{source}-{key[:KEY_LETTERS]}"


def unscored_steps(run: RunFolder) -> list[int]:
    """Published steps without any score; none in a run for which nobody ever asked for one."""
    if not (run.eval / "ledger").is_dir():
        return []
    return [step for step in run.steps() if not any(run.eval.glob(f"checkpoint-{step}/*/{METRICS}"))]
