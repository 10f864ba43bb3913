"""Metrics as scalars and as a table."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

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
    text = metrics_table(metrics)
    assert "1 images" in text and "precision -, recall -, f1 -" in text and "nan" not in text
    assert flat_scalars(metrics) == {}


def test_a_class_without_true_objects_has_no_score_in_the_table_and_a_line_of_its_own():
    said = (SCREW, CABLE, BBUObject((400, 0, 500, 100), "挡风板/已安装"))
    prediction = Prediction("a", said, (0.9, 0.8, 0.7), score_source="objectness")
    metrics = evaluate_predictions(VIEWS, [prediction], SCHEME, resamples=0)
    text = metrics_table(metrics)
    assert "1 predictions are of 1 classes that the ground truth lacks (class-aware AP leaves these" in text
    assert "precision and F1 count 1 of them): 1 挡风板/已安装" in text
    assert "AP counts all boxes, at most 3 in an image here" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("type") and line.endswith("挡风板")]
    assert row == ["type", "0", "1", "0", "-", "-", "-", "挡风板"]


def test_photos_with_more_objects_than_the_head_reports_are_named(metrics: Metrics):
    limited = replace(metrics, prediction_limit=1, over_limit=1)
    assert "1 images have more objects than the 1 that the head reports" in metrics_table(limited)
    assert "head reports" not in metrics_table(metrics)


@pytest.mark.parametrize("module", ["bbu.inference.parse", "bbu.evaluation.report", "bbu.run.ledger"])
def test_scoring_needs_no_torch(module: str):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
