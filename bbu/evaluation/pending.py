"""Where a run keeps its scores, and which of its checkpoints still lack one.

eval/ledger/                              who scores what (bbu.run.ledger)
eval/checkpoint-{step}/{source}-{key}/             one evaluation: predictions.jsonl while it runs, metrics.json after
"""

from __future__ import annotations

import json
from pathlib import Path

from bbu.run.folder import HEAD_KEY, RunFolder
from bbu.run.ledger import Ledger
from bbu.schema import SOURCES

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
KEY_LETTERS = 12
"""Enough of a key to name a folder."""


def open_ledger(run: RunFolder, lease_seconds: float) -> Ledger:
    """The run's ledger; from then on rotation spares what has no score."""
    return Ledger(run.eval / "ledger", lease_seconds=lease_seconds)


def result_folder(run: RunFolder, step: int, source: str, key: str) -> Path:
    """Where the evaluation `key` of a checkpoint lies; source says what was asked, the answer or the head."""
    return run.eval / f"checkpoint-{step}" / f"{source}-{key[:KEY_LETTERS]}"


def sources_of(checkpoint: Path) -> tuple[str, ...]:
    """What a checkpoint can be asked: one without a detection head has its answer alone."""
    described = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return SOURCES if described.get(HEAD_KEY) else SOURCES[:1]


def unscored_steps(run: RunFolder) -> list[int]:
    """Published steps that lack a score, or that a worker is scoring; none where nobody ever asked for scores."""
    if not (run.eval / "ledger").is_dir():
        return []
    held = {owner.get("step") for owner in Ledger(run.eval / "ledger").held()}
    return [step for step in run.steps() if step in held or not _is_scored(run, step)]


def _is_scored(run: RunFolder, step: int) -> bool:
    found = {path.parent.name.partition("-")[0] for path in run.eval.glob(f"checkpoint-{step}/*/{METRICS}")}
    return found >= set(sources_of(run.checkpoint(step)))
