"""Which of a run's scores are its headline and its best: its own, and only where there is a score at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bbu.evaluation.scores import best_f1, best_scores, latest_scores, other_scores
from bbu.run.folder import RunFolder

OWN = {"dataset_sha256": "val", "config": {"eval_iou_threshold": 0.5}}
ON_TRAINING_PHOTOS = OWN | {"dataset_sha256": "train"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "output-a").create()
    settings = {"eval_iou_threshold": 0.5, "data_root": str(tmp_path / "elsewhere"), "val_file": "val.jsonl"}
    made.config.write_text(yaml.safe_dump(settings))
    made.provenance.write_text(json.dumps({"starts": [{"data_sha256": {"val.jsonl": "val"}}]}))
    return made


def add_score(run: RunFolder, step: int, f1: float | None, record: dict[str, Any], source: str = "answer") -> Path:
    key = len(list(run.eval.rglob("metrics.json")))
    path = run.evaluations(step) / f"{source}-{key}" / "metrics.json"
    path.parent.mkdir(parents=True)
    headline = {"iou": 0.5, "precision": f1, "recall": f1, "f1": f1}
    path.write_text(json.dumps({"step": step, "headline": headline, **record}))
    return path


def texts(run: RunFolder) -> list[str]:
    return [f"{score.step}: {score.brief}" for score in latest_scores(run)]


def test_a_score_on_other_photos_does_not_replace_the_headline(run: RunFolder):
    add_score(run, 10, 0.4, OWN)
    add_score(run, 10, 1.0, ON_TRAINING_PHOTOS)
    add_score(run, 20, 1.0, ON_TRAINING_PHOTOS)
    assert texts(run) == ["10: answer 0.400"]
    assert [str(score) for score in other_scores(run)] == [
        "step 20, answer: precision 1.000, recall 1.000, F1 1.000 (other val_file)"
    ]
    assert {source: score.f1 for source, score in best_scores(run).items()} == {"answer": 0.4}


def test_where_no_score_is_the_runs_own_the_others_are_shown_marked_and_not_ranked(run: RunFolder):
    add_score(run, 10, 1.0, ON_TRAINING_PHOTOS)
    add_score(run, 10, 0.9, OWN | {"config": {"eval_iou_threshold": 0.75}, "teachers": 1}, "head")
    assert texts(run) == ["10: answer 1.000 (other val_file)", "10: head 0.900 (other teachers, eval_iou_threshold)"]
    assert best_f1(best_scores(run)) == -1.0


def test_a_run_without_any_score_over_a_true_object_is_not_ranked(run: RunFolder):
    add_score(run, 10, None, OWN)
    assert texts(run) == ["10: answer -"]
    assert best_f1(best_scores(run)) == -1.0
    add_score(run, 5, 0.0, OWN)
    assert best_scores(run)["answer"].step == 5 and best_f1(best_scores(run)) == 0.0


def test_a_perfect_score_that_an_older_version_gave_for_nothing_is_none(run: RunFolder):
    add_score(run, 10, 1.0, OWN | {"images": {"objects_true": 0}})
    assert texts(run) == ["10: answer -"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "[" * 100_000, '{"headline": 3}', '{"headline": {"iou": 0.5, "f1": 1, "precision": 1}}',
        '{"headline": {"iou": 0.5, "f1": "1", "precision": 1, "recall": 1}}',
        '{"headline": {"iou": 0.5, "f1": NaN, "precision": 1, "recall": 1}}',
        '{"headline": {"iou": 0.5, "f1": true, "precision": 1, "recall": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_hides_no_other_score(
    run: RunFolder, content: str, caplog: pytest.LogCaptureFixture
):
    add_score(run, 10, 0.4, OWN)
    path = add_score(run, 20, 0.5, OWN)
    path.write_text(content)
    assert texts(run) == ["10: answer 0.400"]
    assert str(path) in caplog.text
