"""Which checkpoints of a run lack a score, and which scores it has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bbu.evaluation.pending import metrics_files, open_ledger, sources_of, unscored_steps
from bbu.evaluation.scores import best_scores, latest_scores
from bbu.run.folder import HEAD_KEY, RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with an answer alone at step 3, and with a detection head at step 6."""
    made = RunFolder.of(tmp_path, "demo").create()
    for step, config in ((3, {}), (6, {HEAD_KEY: {"layers": 1}})):
        made.checkpoint(step).mkdir()
        (made.checkpoint(step) / "config.json").write_text(json.dumps(config))
    return made


def add_score(run: RunFolder, step: int, source: str, f1: float, key: str = "abc") -> Path:
    path = run.evaluations(step) / f"{source}-{key}" / "metrics.json"
    path.parent.mkdir(parents=True)
    headline = {"iou": 0.5, "precision": 0.5, "recall": 0.5, "f1": f1}
    path.write_text(json.dumps({"step": step, "headline": headline}))
    return path


def test_without_a_ledger_no_step_waits_for_a_score(run: RunFolder):
    assert unscored_steps(run) == []


def test_a_step_is_scored_once_each_of_its_sources_is(run: RunFolder):
    open_ledger(run, lease_seconds=60)
    assert sources_of(run.checkpoint(3)) == ("answer",)
    assert sources_of(run.checkpoint(6)) == ("answer", "head", "both")
    add_score(run, 3, "answer", 0.5)
    add_score(run, 6, "answer", 0.5)
    assert unscored_steps(run) == [6]
    add_score(run, 6, "head", 0.5)
    add_score(run, 6, "both", 0.5)
    assert unscored_steps(run) == []


def test_a_step_that_a_worker_scores_again_counts_as_unscored(run: RunFolder):
    ledger = open_ledger(run, lease_seconds=60)
    add_score(run, 3, "answer", 0.5)
    claim = ledger.claim("key", {"step": 3})
    assert claim is not None and unscored_steps(run) == [3, 6]
    claim.lease.release()
    assert unscored_steps(run) == [6]


def test_of_several_scores_of_one_source_the_newest_counts(run: RunFolder):
    old, new = add_score(run, 3, "answer", 0.5, "old"), add_score(run, 3, "answer", 0.25, "new")
    os.utime(old, (1, 1))
    assert {path for _, path in metrics_files(run, 3)} == {old, new}
    assert [score.f1 for score in latest_scores(run)] == [0.25]


def test_scores_of_the_last_step_in_the_order_of_the_sources_and_the_best_of_all_steps(run: RunFolder):
    add_score(run, 3, "answer", 0.5)
    add_score(run, 12, "both", 0.125)  # its checkpoint is rotated away
    add_score(run, 12, "answer", 0.25)
    assert [str(score) for score in latest_scores(run)] == [
        "step 12, answer: precision 0.500, recall 0.500, F1 0.250",
        "step 12, both: precision 0.500, recall 0.500, F1 0.125",
    ]
    assert {source: score.step for source, score in best_scores(run).items()} == {"answer": 3, "both": 12}
