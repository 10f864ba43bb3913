"""The headline scores a run has so far, for whoever looks at many runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bbu.evaluation.pending import metrics_files
from bbu.run.folder import RunFolder, checkpoint_steps
from bbu.schema import SOURCES, Source


@dataclass(frozen=True)
class Score:
    """The headline of one evaluation: class-aware precision, recall and F1 at the config's IoU."""

    step: int
    """the checkpoint's step"""
    source: Source
    """what predicted"""
    precision: float
    """share of the predicted objects that are right"""
    recall: float
    """share of the true objects that were found"""
    f1: float
    """harmonic mean of precision and recall"""

    def __str__(self) -> str:
        values = f"precision {self.precision:.3f}, recall {self.recall:.3f}, F1 {self.f1:.3f}"
        return f"step {self.step}, {self.source}: {values}"

    @classmethod
    def from_metrics(cls, source: Source, metrics: Mapping[str, Any]) -> Score:
        """Take the headline from the content of a metrics.json, of this version or an older one."""
        headline = metrics["headline"]
        return cls(metrics["step"], source, headline["precision"], headline["recall"], headline["f1"])


def latest_scores(run: RunFolder) -> list[Score]:
    """The scores of the last step that has any."""
    steps = _scored_steps(run)
    return _scores_at(run, steps[-1]) if steps else []


def best_scores(run: RunFolder) -> dict[str, Score]:
    """For each source the score with the best F1 of all steps; the later of two equals."""
    best: dict[str, Score] = {}
    for score in (score for step in _scored_steps(run) for score in _scores_at(run, step)):
        if score.source not in best or score.f1 >= best[score.source].f1:
            best[score.source] = score
    return best


def _scored_steps(run: RunFolder) -> list[int]:
    """Steps with a score, in ascending order; also of checkpoints that are rotated away by now."""
    return [step for step in checkpoint_steps(run.eval) if metrics_files(run, step)]


def _scores_at(run: RunFolder, step: int) -> list[Score]:
    """The scores of one step, in the order of SOURCES; of several of one source the newest."""
    newest: dict[Source, Score] = {}
    for source, path in sorted(metrics_files(run, step), key=lambda item: item[1].stat().st_mtime):
        newest[source] = Score.from_metrics(source, json.loads(path.read_text(encoding="utf-8")))
    return [newest[source] for source in SOURCES if source in newest]
