"""The headline scores a run has so far, for whoever looks at many runs.

Scores that differ from the run's own in their validation file or settings say so, and are neither the headline nor the
best of a run that has scores of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.evaluation.pending import metrics_files
from bbu.evaluation.report import score_text
from bbu.evaluation.run_settings import RunSettings
from bbu.run.folder import RunFolder, checkpoint_steps
from bbu.schema import SOURCES, Source
from bbu.strict_json import JsonError, build_dataclass, read_json

logger = logging.getLogger(__name__)
_SHARES = ("precision", "recall", "f1")
"""The scores of a headline."""


@dataclass(frozen=True)
class Score:
    """The headline of one evaluation: class-aware precision, recall and F1 at the config's IoU."""

    step: int
    """the checkpoint's step"""
    source: Source
    """what predicted"""
    precision: float | None
    """share of the predicted objects that are right; None where there is no score"""
    recall: float | None
    """share of the true objects that were found; None where there is no score"""
    f1: float | None
    """harmonic mean of precision and recall; None where there is no score, as over no true object"""
    differs: tuple[str, ...] = ()
    """config keys, and facts such as `val_file`, in which the evaluation differs from the run"""
    dataset_sha256: str | None = None
    """hash of the ground truth; None where the file does not state it"""

    def __str__(self) -> str:
        values = (("precision", self.precision), ("recall", self.recall), ("F1", self.f1))
        return f"step {self.step}, {self.source}: {', '.join(f'{n} {score_text(v)}' for n, v in values)}{self._mark}"

    @property
    def brief(self) -> str:
        """Source and F1, such as `answer 0.500`, and what differs."""
        return f"{self.source} {score_text(self.f1)}{self._mark}"

    @property
    def _mark(self) -> str:
        return f" (other {', '.join(self.differs)})" if self.differs else ""

    def to_dict(self) -> dict[str, Any]:
        """The score for JSON; `differs` where anything does."""
        numbers = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        marks = {"differs": list(self.differs)} if self.differs else {}
        return {"step": self.step, "source": self.source, **numbers, **marks}


def latest_scores(run: RunFolder) -> list[Score]:
    """The scores of the last step that has any of the run's own; where none has, the others of the last step."""
    return _last_step(_own_scores(scores := _all_scores(run)) or scores)


def other_scores(run: RunFolder) -> list[Score]:
    """The scores on other photos or under other settings than the run's, of the last step that has any."""
    return _last_step([score for score in _all_scores(run) if score.differs])


def best_scores(run: RunFolder) -> dict[str, Score]:
    """For each source the run's own score with the best F1 of all steps; the later of two equals.

    Where no score is the run's own, the best of the others.
    """
    best: dict[str, Score] = {}
    for score in _own_scores(scores := _all_scores(run)) or scores:
        if score.source not in best or _rank(score) >= _rank(best[score.source]):
            best[score.source] = score
    return best


def best_f1(scores: Mapping[str, Score]) -> float:
    """The number that runs are ranked by, from their `best_scores`; -1 without a score of the run's own."""
    return max((_rank(score) for score in scores.values() if not score.differs), default=-1.0)


def _rank(score: Score) -> float:
    return -1.0 if score.f1 is None else score.f1


def _own_scores(scores: Sequence[Score]) -> list[Score]:
    return [score for score in scores if not score.differs]


def _last_step(scores: Sequence[Score]) -> list[Score]:
    return [score for score in scores if score.step == scores[-1].step]


def _all_scores(run: RunFolder) -> list[Score]:
    """All scores by step; also of checkpoints that are rotated away by now."""
    settings = RunSettings.of_run(run)
    return [score for step in checkpoint_steps(run.eval) for score in _scores_at(run, step, settings)]


def _scores_at(run: RunFolder, step: int, settings: RunSettings) -> list[Score]:
    """The scores of one step, in the order of SOURCES; of several of one source and settings the newest."""
    newest: dict[tuple[Source, tuple[str, ...]], Score] = {}
    for source, path in sorted(metrics_files(run, step), key=lambda item: item[1].stat().st_mtime):
        try:
            score = _read_score(step, source, path, settings)
        except CheckpointError as error:  # one damaged file must not hide all other scores
            logger.warning("%s", error)
        else:
            newest[source, score.differs] = score
    return sorted(newest.values(), key=lambda score: (SOURCES.index(score.source), score.differs))


def _read_score(step: int, source: Source, path: Path, settings: RunSettings) -> Score:
    """Take the headline from a metrics.json, of this version or an older one."""
    advice = "remove the folder and score again"
    content = read_json(path, CheckpointError, advice)
    headline = content.get("headline")
    shares = {k: v for k, v in headline.items() if k in _SHARES} if isinstance(headline, dict) else {}
    values = dict.fromkeys(shares) if _is_about_nothing(content) else shares
    facts = {"differs": list(settings.differences(content)), "dataset_sha256": content.get("dataset_sha256")}
    try:
        return build_dataclass(Score, {"step": step, "source": source, **values, **facts})
    except JsonError as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from error


def _is_about_nothing(content: Mapping[str, Any]) -> bool:
    """Whether there was no true object: older versions wrote scores of 1 or 0 then."""
    match content:
        case {"images": {"objects_true": 0}}:
            return True
    return False
