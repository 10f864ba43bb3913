"""One evaluation under a claim: whatever a worker left is used, and a result is published once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bbu.config.read import load_config
from bbu.errors import CheckpointError
from bbu.evaluation.job import Evaluation, run_evaluation
from bbu.evaluation.pending import METRICS, PREDICTIONS
from bbu.evaluation.predictions import Prediction
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.run.ledger import Ledger
from bbu.schema import BBUObject, View
from tests.evaluation.test_metrics import FACTS

CABLE = BBUObject((0, 0, 100, 100), "线缆/光纤")
TRAINING = load_config("smoke", overrides=["eval_bootstrap_samples=0"]).training


@pytest.fixture
def work(tmp_path: Path) -> Evaluation:
    views = [View((name,), (CABLE,)) for name in "abc"]
    scheme = LabelScheme({"线缆": ("光纤",)}, RESPONSE_TYPES)
    return Evaluation(6, tmp_path / "result", views, FACTS, scheme, min_score=0.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def one_by_one(views: Sequence[View]) -> Iterator[list[Prediction]]:
    for view in views:
        yield [Prediction(view.images[0], view.objects)]


def fail(views: Sequence[View]) -> Iterator[list[Prediction]]:
    yield [Prediction(views[0].images[0], ())]
    raise KeyboardInterrupt


def never(views: Sequence[View]) -> Iterator[list[Prediction]]:
    raise AssertionError(f"{len(views)} photos are predicted again")


def test_a_published_result_is_not_computed_again_and_a_missing_metrics_file_is_written(work: Evaluation, ledger):
    first = run_evaluation(work, ledger, {}, TRAINING, one_by_one)
    (work.folder / METRICS).unlink()
    assert run_evaluation(work, ledger, {}, TRAINING, never) == first
    assert first is not None and first.metrics.headline.recall == 1.0
    assert (work.folder / METRICS).is_file()


def test_an_interrupted_worker_gives_its_claim_back_and_leaves_its_predictions(work: Evaluation, ledger: Ledger):
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(work, ledger, {}, TRAINING, fail)
    assert ledger.held() == []
    assert len((work.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()) == 1
    result = run_evaluation(work, ledger, {}, TRAINING, one_by_one)
    assert result is not None and result.metrics.headline.recall == pytest.approx(2 / 3)


def test_while_another_worker_holds_the_claim_there_is_nothing_to_do(work: Evaluation, ledger: Ledger):
    claim = ledger.claim(FACTS.key(), {"step": 6})
    assert claim is not None
    assert run_evaluation(work, ledger, {}, TRAINING, never) is None


def test_a_worker_that_lost_its_claim_publishes_nothing(work: Evaluation, ledger: Ledger):
    def take_over(views: Sequence[View]) -> Iterator[list[Prediction]]:
        (claim,) = (ledger_folder / "claims").iterdir()
        os.utime(claim, (0, 0))
        assert ledger.claim(FACTS.key(), {"step": 6, "host": "other"}) is not None
        yield from one_by_one(views)

    ledger_folder = work.folder.parent / "ledger"
    with pytest.raises(CheckpointError, match="another worker took the evaluation"):
        run_evaluation(work, ledger, {}, TRAINING, take_over)
    assert ledger.result(FACTS.key()) is None
    assert [owner["host"] for owner in ledger.held()] == ["other"]
