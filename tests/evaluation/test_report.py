"""metrics.json, the scalars and the table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bbu.evaluation.predictions import Prediction
from bbu.evaluation.report import evaluate, scalars, table, write_metrics
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View

SCREW = BBUObject((0, 0, 100, 100), "螺丝连接点/BBU安装螺丝/连接正确")
CABLE = BBUObject((200, 0, 300, 100), "线缆/光纤")
SCHEME = LabelScheme({"螺丝连接点": ("BBU安装螺丝",), "线缆": ("光纤",)}, RESPONSE_TYPES)
VIEWS = [View(("a",), (SCREW, CABLE)), View(("b",), (SCREW,))]


@pytest.fixture
def metrics() -> dict:
    lost = Prediction("b", (), status="unparsed", rejected={"bad_box": 2})
    return evaluate(VIEWS, [Prediction("a", (SCREW, CABLE)), lost], SCHEME, resamples=50)


def test_metrics_survive_the_file_and_leave_nothing_beside_it(tmp_path, metrics: dict):
    write_metrics(tmp_path / "metrics.json", metrics)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_scalars_are_flat_numbers_with_the_headline_among_them(metrics: dict):
    flat = scalars(metrics)
    assert flat["detection/class_aware/recall@0.50"] == pytest.approx(2 / 3)
    assert flat["labels/status/accuracy"] == 1.0
    assert all(isinstance(v, float) for v in flat.values())


def test_scalars_of_scored_predictions_name_the_source():
    said = [Prediction("a", (SCREW,), (0.9,), score_source="objectness"), Prediction("b", ())]
    flat = scalars(evaluate(VIEWS, said, SCHEME, resamples=50))
    assert 0 < flat["objectness/class_aware/AP50"] < 1


def test_the_table_tells_what_became_of_every_image_and_class(metrics: dict):
    text = table(metrics)
    assert "2 images (1 ok, 1 unparsed; 0 not predicted), 3 objects true, 2 predicted; rejected: 2 bad_box" in text
    assert "class_aware" in text and "0.667" in text and "BBU安装螺丝" in text


def test_a_dataset_without_any_object_can_be_reported():
    metrics = evaluate([View(("empty",), ())], [Prediction("empty", ())], SCHEME, resamples=10)
    assert "1 images" in table(metrics) and scalars(metrics)["detection/class_aware/f1@0.50"] == 1.0


@pytest.mark.parametrize("module", ["bbu.inference.parse", "bbu.evaluation.report", "bbu.run.ledger"])
def test_scoring_needs_no_torch(module: str):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
