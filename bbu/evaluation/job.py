"""Scores one checkpoint under a claim: predictions that survive a kill, metrics published once.

Torch-free: whoever calls says how to predict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import TrainingConfig
from bbu.evaluation.pending import METRICS, PREDICTIONS
from bbu.evaluation.predictions import Prediction, drop_cut_line, dump_prediction, read_predictions
from bbu.evaluation.report import evaluate, write_metrics
from bbu.labels import LabelScheme
from bbu.run.lease import keep_alive
from bbu.run.ledger import Ledger
from bbu.schema import View

Predict = Callable[[Sequence[View]], Iterable[Sequence[Prediction]]]
"""Takes the views still to do and yields predictions batch by batch."""
_HEARTBEATS = 4
"""Heartbeats of a claim within its timeout: three may fail before another worker takes it."""


@dataclass(frozen=True)
class Evaluation:
    """What is scored, where the files go (`folder`), and the facts that go with the result."""

    key: str
    step: int
    folder: Path
    views: Sequence[View]
    facts: Mapping[str, Any]
    scheme: LabelScheme
    """how descriptions are read"""
    least: float
    """score below which an object counts for average precision alone"""


def run_evaluation(
    work: Evaluation, ledger: Ledger, owner: Mapping[str, Any], training: TrainingConfig, predict: Predict
) -> dict[str, Any] | None:
    """Score one checkpoint, or learn that it is scored. None while another worker holds it.

    The predictions of an interrupted worker are kept. Whoever finds a published result without its metrics.json
    (its publisher was killed in between) writes that.
    """
    result = ledger.result(work.key)
    if result is None:
        claim = ledger.claim(work.key, {"step": work.step, **owner})
        if claim is None:
            return ledger.result(work.key)
        with keep_alive(claim.lease, ledger.lease_seconds / _HEARTBEATS) as lease:
            result = metrics_of(work, training, predict_rest(work, predict))
            lease.check()
            ledger.publish(claim, result)
        result = ledger.result(work.key)
        assert result is not None
    if not (work.folder / METRICS).exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        write_metrics(work.folder / METRICS, result)
    return result


def metrics_of(work: Evaluation, training: TrainingConfig, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """All metrics of finished predictions, with the facts they belong to."""
    metrics = evaluate(
        work.views,
        predictions,
        work.scheme,
        iou=training.eval_iou_threshold,
        resamples=training.eval_bootstrap_samples,
        level=training.eval_bootstrap_confidence,
        least=work.least,
    )
    return {**metrics, "step": work.step, "key": work.key, **work.facts}


def predict_rest(work: Evaluation, predict: Predict) -> list[Prediction]:
    """All predictions of the work: those on disk, and the rest, written as they come."""
    work.folder.mkdir(parents=True, exist_ok=True)
    path = work.folder / PREDICTIONS
    drop_cut_line(path)
    done = {p.image: p for p in read_predictions(path)} if path.exists() else {}
    rest = [view for view in work.views if view.images[0] not in done]
    with path.open("a", encoding="utf-8") as file:
        for batch in predict(rest) if rest else ():
            file.write("".join(map(dump_prediction, batch)))
            file.flush()
            os.fsync(file.fileno())
            done |= {p.image: p for p in batch}
    return [done[view.images[0]] for view in work.views if view.images[0] in done]
