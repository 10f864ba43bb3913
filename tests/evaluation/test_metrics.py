"""metrics.json: what it holds, what its key depends on, and that older files are read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.metrics import EvaluationResult, ScoreFacts, write_metrics
from bbu.evaluation.predictions import Prediction
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View

CABLE = BBUObject((200, 0, 300, 100), "线缆/光纤")
FACTS = ScoreFacts(
    checkpoint_manifest_sha256="m", dataset_sha256="d", config={"a": 1, "b": "中"}, source="answer", teachers=0,
    teachers_sha256=None, code_sha256="c", image_sha256="i", photos_sha256="p", label_scheme_sha256="l",
    score_code_sha256="s", packages={"torch": "2"},
)  # fmt: skip
NEWER_THAN_THE_FIRST_FILES = (
    "photos_sha256", "teacher_photos_sha256", "label_scheme_sha256", "score_code_sha256", "packages",
)  # fmt: skip


@pytest.fixture
def result() -> EvaluationResult:
    scheme = LabelScheme({"线缆": ("光纤",)}, RESPONSE_TYPES)
    metrics = evaluate_predictions([View(("a",), (CABLE,))], [Prediction("a", (CABLE,))], scheme, resamples=10)
    return EvaluationResult(6, FACTS.key(), metrics, FACTS)


def test_a_result_survives_the_file_and_leaves_nothing_beside_it(tmp_path, result: EvaluationResult):
    write_metrics(tmp_path / "metrics.json", result)
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content == result.to_dict()
    assert EvaluationResult.from_dict(content) == result
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_file_of_another_version_is_read(result: EvaluationResult):
    content = {k: v for k, v in result.to_dict().items() if k not in NEWER_THAN_THE_FIRST_FILES} | {"mood": "good"}
    read = EvaluationResult.from_dict(content)
    assert read.metrics == result.metrics and read.facts.dataset_sha256 == "d"
    assert [getattr(read.facts, name) for name in NEWER_THAN_THE_FIRST_FILES] == [None] * 5


CHANGES: list[dict[str, Any]] = [
    {"checkpoint_manifest_sha256": "x"}, {"dataset_sha256": "x"}, {"config": {"a": 2, "b": "中"}}, {"source": "head"},
    {"teachers": 1}, {"teachers_sha256": "x"}, {"teacher_photos_sha256": "x"}, {"photos_sha256": "x"},
    {"label_scheme_sha256": "x"}, {"score_code_sha256": "x"}, {"packages": {"torch": "3"}},
]  # fmt: skip


def test_the_key_depends_on_everything_that_a_score_depends_on():
    assert len({FACTS.key(), *(replace(FACTS, **change).key() for change in CHANGES)}) == len(CHANGES) + 1


def test_the_key_depends_on_nothing_else():
    assert replace(FACTS, config={"b": "中", "a": 1}).key() == FACTS.key()
    assert replace(FACTS, code_sha256="x", image_sha256=None).key() == FACTS.key()
