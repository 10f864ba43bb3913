"""Scores one checkpoint under a claim: predictions that survive a kill, metrics published once.

Torch-free: the caller passes the function that predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bbu.config.domains import TrainingConfig
from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.metrics import EvaluationResult, Metrics, ScoreFacts, write_metrics
from bbu.evaluation.pending import METRICS, PREDICTIONS
from bbu.evaluation.predictions import Prediction, append_predictions, drop_cut_line, read_predictions
from bbu.labels import LabelScheme
from bbu.run.lease import keep_alive
from bbu.run.ledger import Ledger
from bbu.schema import View

Predict = Callable[[Sequence[View]], Iterable[Sequence[Prediction]]]
"""Takes the views that have no prediction yet and yields predictions batch by batch."""
_HEARTBEATS = 4
"""Heartbeats of a claim within its timeout: three may fail before another worker takes it."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be scored, and where."""

    step: int
    """the checkpoint's step"""
    folder: Path
    """where predictions.jsonl and metrics.json go"""
    views: Sequence[View]
    """the ground truth"""
    facts: ScoreFacts
    """what the result depends on; gives the key in the ledger"""
    scheme: LabelScheme
    """how descriptions are read"""
    min_score: float
    """predictions with a lower score count for average precision alone"""
    prediction_limit: int | None = None
    """most objects that the source reports for a photo; None where it has no limit"""


def run_evaluation(
    work: Evaluation, ledger: Ledger, owner: Mapping[str, Any], training: TrainingConfig, predict: Predict
) -> EvaluationResult | None:
    """Score a checkpoint, unless it is scored already.

    The predictions of an interrupted worker are used. Where a published result lacks its metrics.json, because its
    publisher was killed in between, the file is written.

    Args:
        work: what to score.
        ledger: the run's ledger.
        owner: what people shall read in the claim, such as job id and host.
        training: the thresholds and the bootstrap.
        predict: makes the missing predictions.

    Returns:
        The published result; None while another worker holds the claim.
    """
    key = work.facts.key()
    if ledger.result(key) is None:
        claim = ledger.claim(key, {"step": work.step, **owner})
        if claim is not None:
            with keep_alive(claim.lease, ledger.lease_seconds / _HEARTBEATS) as lease:
                metrics = _compute_metrics(work, training, _complete_predictions(work, predict))
                lease.check()
                ledger.publish(claim, EvaluationResult(work.step, key, metrics, work.facts).to_dict())
    published = ledger.result(key)
    if published is None:
        return None
    result = EvaluationResult.from_dict(published)
    if not (work.folder / METRICS).exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        write_metrics(work.folder / METRICS, result)
    return result


def _compute_metrics(work: Evaluation, training: TrainingConfig, predictions: Sequence[Prediction]) -> Metrics:
    metrics = evaluate_predictions(
        work.views,
        predictions,
        work.scheme,
        iou=training.eval_iou_threshold,
        resamples=training.eval_bootstrap_samples,
        level=training.eval_bootstrap_confidence,
        min_score=work.min_score,
    )
    limit = work.prediction_limit
    over_limit = 0 if limit is None else sum(len(view.objects) > limit for view in work.views)
    return replace(metrics, prediction_limit=limit, over_limit=over_limit)


def _complete_predictions(work: Evaluation, predict: Predict) -> list[Prediction]:
    """Read the predictions that are on disk, make the others, and append those batch by batch."""
    work.folder.mkdir(parents=True, exist_ok=True)
    path = work.folder / PREDICTIONS
    drop_cut_line(path)
    done = {p.image: p for p in read_predictions(path)} if path.exists() else {}
    missing = [view for view in work.views if view.images[0] not in done]
    with path.open("a", encoding="utf-8") as file:
        for batch in predict(missing) if missing else ():
            append_predictions(file, batch)
            done |= {p.image: p for p in batch}
    return [done[view.images[0]] for view in work.views if view.images[0] in done]
