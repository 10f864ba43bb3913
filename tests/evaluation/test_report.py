"""Metrics as scalars and as a table."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.metrics import Metrics
from bbu.evaluation.predictions import Prediction
from bbu.evaluation.report import flat_scalars, metrics_table
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View

SCREW = BBUObject((0, 0, 100, 100), "螺丝连接点/BBU安装螺丝/连接正确")
CABLE = BBUObject((200, 0, 300, 100), "线缆/光纤")
SCHEME = LabelScheme({"螺丝连接点": ("BBU安装螺丝",), "线缆": ("光纤",)}, RESPONSE_TYPES)
VIEWS = [View(("a",), (SCREW, CABLE)), View(("b",), (SCREW,))]


@pytest.fixture
def metrics() -> Metrics:
    lost = Prediction("b", (), status="unparsed", rejected={"bad_box": 2})
    return evaluate_predictions(VIEWS, [Prediction("a", (SCREW, CABLE)), lost], SCHEME, resamples=50)


def test_scalars_are_flat_numbers_with_the_headline_among_them(metrics: Metrics):
    flat = flat_scalars(metrics)
    assert flat["detection/class_aware/recall@0.50"] == pytest.approx(2 / 3)
    assert flat["labels/status/accuracy"] == 1.0
    assert all(isinstance(v, float) for v in flat.values())


def test_scalars_of_scored_predictions_name_the_source():
    predictions = [Prediction("a", (SCREW,), (0.9,), score_source="objectness"), Prediction("b", ())]
    flat = flat_scalars(evaluate_predictions(VIEWS, predictions, SCHEME, resamples=50))
    assert 0 < flat["objectness/class_aware/AP50"] < 1


def test_the_table_shows_what_became_of_every_image_and_class(metrics: Metrics):
    text = metrics_table(metrics)
    assert "2 images (1 ok, 1 unparsed; 0 not predicted), 3 objects true, 2 predicted; rejected: 2 bad_box" in text
    assert "class_aware" in text and "0.667" in text and "BBU安装螺丝" in text


def test_a_dataset_without_any_object_can_be_reported():
    metrics = evaluate_predictions([View(("empty",), ())], [Prediction("empty", ())], SCHEME, resamples=10)
    assert "1 images" in metrics_table(metrics) and flat_scalars(metrics)["detection/class_aware/f1@0.50"] == 1.0


@pytest.mark.parametrize("module", ["bbu.inference.parse", "bbu.evaluation.report", "bbu.run.ledger"])
def test_scoring_needs_no_torch(module: str):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
