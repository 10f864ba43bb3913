"""Where a run keeps its scores, and which of its checkpoints still lack one.

eval/ledger/                                which worker scores what (bbu.run.ledger)
eval/checkpoint-{step}/{source}-{key}/      one evaluation: predictions.jsonl while it runs, metrics.json at its end
"""

from __future__ import annotations

from pathlib import Path

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder, read_head_spec
from bbu.run.ledger import Ledger
from bbu.schema import SOURCES, Source

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
_KEY_LETTERS = 12
"""Letters of a key in the name of a folder: 48 bits, enough to tell apart the evaluations of one checkpoint."""


def open_ledger(run: RunFolder, lease_seconds: float) -> Ledger:
    """Open the run's ledger, made where absent; from then on rotation spares checkpoints without a score.

    lease_seconds: a claim without a heartbeat for so long is taken for abandoned.
    """
    return Ledger(_ledger_folder(run), lease_seconds=lease_seconds)


def result_folder(run: RunFolder, step: int, source: Source, key: str) -> Path:
    """The folder of one evaluation of a checkpoint.

    Args:
        run: the run that the checkpoint belongs to.
        step: the checkpoint's step.
        source: what predicts.
        key: the evaluation's name in the ledger.
    """
    return run.evaluations(step) / f"{source}-{key[:_KEY_LETTERS]}"


def sources_of(checkpoint: Path) -> tuple[Source, ...]:
    """The sources that a checkpoint can be scored by: one without a detection head has its answer alone."""
    return SOURCES if read_head_spec(checkpoint, CheckpointError) else SOURCES[:1]


def unscored_steps(run: RunFolder) -> list[int]:
    """Published steps that lack a score or are being scored: the steps that checkpoint rotation must spare.

    None where the run has no ledger, because then nobody scores it. A score under an older key counts. A checkpoint
    that cannot be read has no score that could be found.
    """
    if not _ledger_folder(run).is_dir():
        return []
    in_work = {owner.get("step") for owner in Ledger(_ledger_folder(run)).held()}
    return [step for step in run.steps() if step in in_work or not _is_scored(run, step)]


def metrics_files(run: RunFolder, step: int) -> list[tuple[Source, Path]]:
    """Every finished evaluation of a checkpoint as (source, metrics.json), in no particular order."""
    paths = run.evaluations(step).glob(f"*/{METRICS}")
    named = ((path.parent.name.partition("-")[0], path) for path in paths)
    return [(source, path) for name, path in named for source in SOURCES if source == name]


def _is_scored(run: RunFolder, step: int) -> bool:
    try:
        return {source for source, _ in metrics_files(run, step)} >= set(sources_of(run.checkpoint(step)))
    except (OSError, CheckpointError):
        return False


def _ledger_folder(run: RunFolder) -> Path:
    return run.eval / "ledger"
