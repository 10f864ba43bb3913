"""Detection scores: cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bbu.errors import DataError
from bbu.evaluation.detection import bootstrap, count_matches, f_scores, summarise
from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.matching import Pairing, find_overlaps
from bbu.evaluation.predictions import Prediction
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View
from tests.evaluation.coco import random_photos

SCREW_OK, SCREW_BAD, CABLE = "螺丝连接点/BBU安装螺丝/连接正确", "螺丝连接点/BBU安装螺丝/连接错误", "线缆/光纤"


SCHEME = LabelScheme(
    {"螺丝连接点": ("BBU安装螺丝",), "线缆": ("光纤", "非光纤"), "bbu基带处理单元": ("华为",)}, RESPONSE_TYPES
)


def thing(x: float, desc: str, width: float = 100) -> BBUObject:
    return BBUObject((x, 0, x + width, 100), desc)


def view(name: str, *objects: BBUObject) -> View:
    return View((name,), objects, 1000, 1000)


def scores_of(views: list[View], *predictions: Prediction) -> dict:
    return dict(evaluate_predictions(views, predictions, SCHEME, resamples=20).detection)


def test_perfect_predictions_score_one_everywhere():
    views = [view("a", thing(0, SCREW_OK), thing(200, CABLE)), view("empty")]
    scores = scores_of(views, Prediction("a", views[0].objects), Prediction("empty", ()))
    assert {v for mode in scores.values() for v in mode.values()} == {1.0}


def test_a_case_worked_by_hand():
    # Shifts of 20 and 50 of 100 pixels: IoU 80/120 = 0.667 (passes 0.5 .. 0.65) and 50/150 = 0.333 (never).
    views = [view("a", thing(0, SCREW_OK), thing(300, SCREW_OK), thing(600, CABLE))]
    said = (thing(20, SCREW_OK), thing(350, SCREW_OK), thing(600, CABLE), thing(600, CABLE))
    score = scores_of(views, Prediction("a", said))["class_aware"]
    assert score["precision@0.50"] == pytest.approx(2 / 4)
    assert score["recall@0.50"] == pytest.approx(2 / 3)
    assert score["f1@0.50"] == pytest.approx(4 / 7)
    assert score["precision@0.75"] == pytest.approx(1 / 4)
    assert score["recall@0.50:0.95"] == pytest.approx((4 * 2 / 3 + 6 * 1 / 3) / 10)


def test_a_wrong_status_counts_down_to_the_level_it_is_wrong_on():
    views = [view("a", thing(0, SCREW_OK))]
    scores = scores_of(views, Prediction("a", (thing(0, SCREW_BAD),)))
    assert {mode: s["f1@0.50"] for mode, s in scores.items()} == {
        "class_agnostic": 1.0, "type": 1.0, "property": 1.0, "class_aware": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("status", ["failed", "truncated", "unparsed", None])
def test_an_image_without_usable_prediction_keeps_its_ground_truth(status: str | None):
    views = [view("a", thing(0, CABLE)), view("b", thing(0, CABLE))]
    lost = () if status is None else (Prediction("b", (), status=status),)
    scores = scores_of(views, Prediction("a", views[0].objects), *lost)
    assert scores["class_aware"]["recall@0.50"] == 0.5
    assert scores["class_aware"]["precision@0.50"] == 1.0


def test_predictions_on_an_empty_image_cost_precision():
    views = [view("a", thing(0, CABLE)), view("empty")]
    said = Prediction("a", views[0].objects), Prediction("empty", (thing(0, CABLE),))
    assert scores_of(views, *said)["class_aware"]["precision@0.50"] == 0.5


def test_more_objects_than_cocos_hundred_are_all_counted():
    boxes = 150
    objects = tuple(thing(4 * i, CABLE, 4) for i in range(boxes))
    scores = tuple(np.linspace(0.1, 0.9, boxes).tolist())
    said = Prediction("a", objects, scores, score_source="objectness")
    metrics = evaluate_predictions([View(("a",), objects)], [said], SCHEME, resamples=0)
    assert metrics.detection["class_aware"]["recall@0.50"] == 1.0
    assert metrics.average_precision is not None and metrics.average_precision["max_detections"] == boxes
    for mode in ("class_agnostic", "class_aware"):
        precision = metrics.average_precision[mode]
        assert (precision["AP"], precision["AR100"]) == (1.0, pytest.approx(100 / boxes))


@pytest.mark.parametrize("said", [(), (thing(0, CABLE), thing(200, SCREW_OK))], ids=["nothing said", "false finds"])
@pytest.mark.parametrize("source", [None, "objectness"])
def test_where_nothing_is_true_there_is_no_score_of_any_kind(said: tuple[BBUObject, ...], source: str | None):
    prediction = Prediction("a", said, (0.5,) * len(said) if source else (), score_source=source)
    metrics = evaluate_predictions([view("a"), view("b")], [prediction], SCHEME, resamples=10)
    assert (metrics.headline.precision, metrics.headline.recall, metrics.headline.f1) == (None, None, None)
    assert {value for values in metrics.detection.values() for value in values.values()} == {None}
    assert {value for values in metrics.intervals.values() for value in values.values()} == {None}
    rows = [row for level in metrics.labels.values() for row in level["per_class"].values()]
    assert {row[name] for row in rows for name in ("precision", "recall", "f1")} <= {None}
    assert {level["accuracy"] for level in metrics.labels.values()} == {None}
    if metrics.average_precision:
        modes = [metrics.average_precision[mode] for mode in ("class_agnostic", "class_aware")]
        assert {value for mode in modes for value in mode.values()} == {None}
    assert metrics.images.objects_predicted == len(said)


def test_without_predictions_there_is_no_precision_but_a_recall_and_an_f1_of_zero():
    score = scores_of([view("a", thing(0, CABLE))], Prediction("a", ()))["class_aware"]
    assert (score["precision@0.50"], score["recall@0.50"], score["f1@0.50"]) == (None, 0.0, 0.0)


def test_scores_are_defined_for_each_count_alone():
    precision, recall, f1 = f_scores([1, 0, 0, 0], [2, 0, 3, 0], [1, 2, 0, 0])
    np.testing.assert_array_equal(precision, [0.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(recall, [1, 0, np.nan, np.nan])
    np.testing.assert_allclose(f1, [2 / 3, 0, np.nan, np.nan])


def test_resamples_without_a_true_object_do_not_count_in_the_interval():
    views = [view("a", thing(0, CABLE)), *(view(f"empty{i}") for i in range(5))]
    said = [Prediction("a", (thing(0, CABLE),))]
    (interval,) = {
        tuple(values["f1@0.50"] or ()) for values in evaluate_predictions(views, said, SCHEME).intervals.values()
    }
    assert interval == (1.0, 1.0)


def test_false_finds_of_a_class_that_the_truth_lacks_are_counted_and_cost_f1():
    views = [view("a", thing(0, CABLE))]
    said = (thing(0, CABLE), thing(200, SCREW_OK), thing(400, SCREW_OK), thing(600, "门"))
    prediction = Prediction("a", said, (0.9, 0.8, 0.2, 0.1), score_source="objectness")
    metrics = evaluate_predictions(views, [prediction], SCHEME, resamples=0, min_score=0.5)
    assert metrics.average_precision is not None and metrics.average_precision["class_aware"]["AP"] > 0.999
    assert metrics.absent_classes == {SCREW_OK: {"predicted": 1, "scored": 2}, "门": {"predicted": 0, "scored": 1}}
    assert metrics.detection["class_aware"]["precision@0.50"] == 0.5


def test_an_image_twice_in_the_ground_truth_is_refused():
    with pytest.raises(DataError, match="a: twice in the ground truth"):
        evaluate_predictions([view("a", thing(0, CABLE))] * 2, [], SCHEME)


def views_and_predictions(pairs: list[Pairing], source: str | None) -> tuple[list[View], list[Prediction]]:
    views = [View((str(i),), p.truth) for i, p in enumerate(pairs)]
    said = [Prediction(str(i), p.predicted, p.scores, score_source=source) for i, p in enumerate(pairs)]
    return views, said


def test_ap_is_reported_only_where_scores_exist_and_names_their_source():
    views, said = views_and_predictions(random_photos(0), "objectness")
    scored = evaluate_predictions(views, said, SCHEME, resamples=20).average_precision
    assert scored is not None
    assert scored["score_source"] == "objectness" and 0 < scored["class_aware"]["AP"] < 1
    without = [Prediction(p.image, p.objects, (None,) * len(p.objects)) for p in said]
    assert evaluate_predictions(views, without, SCHEME, resamples=20).average_precision is None


def test_mixed_or_missing_scores_are_refused():
    views, said = views_and_predictions(random_photos(0), "objectness")
    other = Prediction(said[0].image, said[0].objects, said[0].scores, score_source="token_logprob")
    with pytest.raises(DataError, match="mix scores"):
        evaluate_predictions(views, [other, *said[1:]], SCHEME)
    bare = Prediction(said[0].image, said[0].objects, (None,) * len(said[0].objects), score_source="objectness")
    with pytest.raises(DataError, match="without score"):
        evaluate_predictions(views, [bare, *said[1:]], SCHEME)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([Prediction("a", ()), Prediction("a", ())], "predicted twice"),
        ([Prediction("b", ())], "not in the ground truth"),
        ([Prediction("a", (), width=500, height=1000)], "500x1000"),
    ],
)
def test_predictions_of_other_data_are_refused(predictions: list[Prediction], message: str):
    with pytest.raises(DataError, match=message):
        evaluate_predictions([view("a", thing(0, CABLE))], predictions, SCHEME)


def test_no_images_at_all_is_refused():
    with pytest.raises(DataError, match="no image"):
        evaluate_predictions([], [], SCHEME)


def test_the_bootstrap_resamples_images_and_its_interval_holds_the_value():
    counts = count_matches(find_overlaps(random_photos(2, photos=40)), str)
    value, interval = summarise(counts), bootstrap({"any": counts}, resamples=500, seed=3)["any"]
    assert interval == bootstrap({"any": counts, "other": counts}, resamples=500, seed=3)["other"]
    assert all(low <= value[name] <= high for name, (low, high) in interval.items())
    assert interval["f1@0.50"][0] < interval["f1@0.50"][1]


def test_the_bootstrap_equals_resampling_written_out():
    pairs = random_photos(2, photos=6)
    counts, weights = count_matches(find_overlaps(pairs), str), np.array([[2, 0, 1, 0, 3, 0]])
    repeated = [p for p, n in zip(pairs, weights[0], strict=True) for _ in range(n)]
    drawn = {name: float(v[0]) for name, v in summarise(counts, weights).items()}
    assert drawn == pytest.approx(summarise(count_matches(find_overlaps(repeated), str)))
