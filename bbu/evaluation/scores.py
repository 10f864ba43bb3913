"""The headline scores a run has so far, for whoever looks at many runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bbu.evaluation.pending import METRICS
from bbu.run.folder import CHECKPOINT_NAME, RunFolder
from bbu.schema import SOURCES


@dataclass(frozen=True)
class Score:
    """The headline of one evaluation: class-aware precision, recall and F1 at the config's IoU."""

    step: int
    source: str
    precision: float
    recall: float
    f1: float

    def __str__(self) -> str:
        told = f"precision {self.precision:.3f}, recall {self.recall:.3f}, F1 {self.f1:.3f}"
        return f"step {self.step}, {self.source}: {told}"

    @classmethod
    def read(cls, source: str, metrics: Mapping[str, Any]) -> Score:
        told = metrics["headline"]
        return cls(metrics["step"], source, told["precision"], told["recall"], told["f1"])


def scored_steps(run: RunFolder) -> list[int]:
    """Steps with a score, ascending; also of checkpoints that are rotated away by now."""
    found = {path.parent.parent.name for path in run.eval.glob(f"checkpoint-*/*/{METRICS}")}
    return sorted(int(match[1]) for match in map(CHECKPOINT_NAME.fullmatch, found) if match)


def scores_at(run: RunFolder, step: int) -> list[Score]:
    """The scores of one step, in the order of SOURCES; of several of one source the newest."""
    newest: dict[str, Score] = {}
    paths = sorted(run.eval.glob(f"checkpoint-{step}/*/{METRICS}"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        source = path.parent.name.partition("-")[0]
        newest[source] = Score.read(source, json.loads(path.read_text(encoding="utf-8")))
    return [newest[source] for source in SOURCES if source in newest]


def latest_scores(run: RunFolder) -> list[Score]:
    """The scores of the last step that has any."""
    steps = scored_steps(run)
    return scores_at(run, steps[-1]) if steps else []


def best_scores(run: RunFolder) -> dict[str, Score]:
    """For each source the score with the best F1 of all steps; the later of two equals."""
    best: dict[str, Score] = {}
    for score in (score for step in scored_steps(run) for score in scores_at(run, step)):
        if score.source not in best or score.f1 >= best[score.source].f1:
            best[score.source] = score
    return best
