"""Labels scored level by level, read with the label hierarchy and the response types of the config."""

from __future__ import annotations

import pytest

from bbu.evaluation.detection import matched_descriptions
from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.labels import score_labels
from bbu.evaluation.matching import Pairing, find_overlaps
from bbu.evaluation.predictions import Prediction
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View

SCREW_OK, SCREW_BAD, CABLE = "螺丝连接点/BBU安装螺丝/连接正确", "螺丝连接点/BBU安装螺丝/连接错误", "线缆/光纤"
HIERARCHY = {
    "螺丝连接点": ("BBU安装螺丝", "地排处螺丝"),
    "线缆": ("光纤", "非光纤"),
    "bbu基带处理单元": ("华为", "中兴"),
    "标签贴纸": (),
}
SCHEME = LabelScheme(HIERARCHY, RESPONSE_TYPES)
WITHOUT_PROPERTY = LabelScheme(HIERARCHY, ("object_type", "extra_info"))


def thing(x: float, desc: str) -> BBUObject:
    return BBUObject((x, 0, x + 100, 100), desc)


def accuracy_and_support(levels: dict) -> dict[str, tuple[float | None, int]]:
    return {level: (row["accuracy"], row["support"]) for level, row in levels.items()}


def test_labels_are_scored_by_level_with_confusion_and_support():
    truth = (thing(0, SCREW_OK), thing(200, SCREW_OK), thing(400, CABLE), thing(600, "bbu基带处理单元/华为"))
    said = (thing(0, SCREW_OK), thing(200, SCREW_BAD), thing(400, "线缆/非光纤"), thing(800, CABLE))
    levels = score_labels(matched_descriptions(find_overlaps([Pairing(truth, said)])), SCHEME)
    assert accuracy_and_support(levels) == {"type": (1.0, 3), "property": (2 / 3, 3), "status": (0.5, 2)}
    assert levels["status"]["confusion"] == {"连接正确": {"连接正确": 1, "连接错误": 1}}
    assert levels["type"]["confusion"] == {
        "(spurious)": {"线缆": 1},
        "bbu基带处理单元": {"(missed)": 1},
        "线缆": {"线缆": 1},
        "螺丝连接点": {"螺丝连接点": 2},
    }
    screw, huawei = levels["status"]["per_class"]["连接正确"], levels["type"]["per_class"]["bbu基带处理单元"]
    assert (screw["support"], screw["predicted"], screw["precision"], screw["recall"]) == (2, 1, 1.0, 0.5)
    assert (huawei["support"], huawei["recall"]) == (1, 0.0)


def test_a_type_without_properties_scores_its_status_as_a_status():
    levels = score_labels([("标签贴纸/清晰", "标签贴纸/模糊"), ("标签贴纸/清晰", "标签贴纸/清晰")], SCHEME)
    assert accuracy_and_support(levels) == {"type": (1.0, 2), "property": (None, 0), "status": (0.5, 2)}
    assert levels["property"]["per_class"] == {} and set(levels["status"]["per_class"]) == {"清晰", "模糊"}


def test_response_types_without_property_score_the_status_as_a_status():
    matches = [("螺丝连接点/连接正确", "螺丝连接点/连接错误"), ("线缆", "线缆")]
    levels = score_labels(matches, WITHOUT_PROPERTY)
    assert accuracy_and_support(levels) == {"type": (1.0, 2), "property": (None, 0), "status": (0.0, 1)}
    assert levels["status"]["confusion"] == {"连接正确": {"连接错误": 1}}


def test_a_status_that_goes_on_after_a_slash_is_another_status():
    levels = score_labels([("线缆/光纤/松动", "线缆/光纤/松动/破损")], SCHEME)
    assert levels["status"]["confusion"] == {"松动": {"松动/破损": 1}} and levels["status"]["accuracy"] == 0.0


def test_a_type_outside_the_hierarchy_is_a_class_of_its_own():
    levels = score_labels([(CABLE, "电缆/光纤")], SCHEME)
    assert accuracy_and_support(levels) == {"type": (0.0, 1), "property": (1.0, 1), "status": (None, 0)}
    assert levels["type"]["per_class"]["电缆"]["predicted"] == 1


def test_the_property_of_another_type_is_a_wrong_property():
    levels = score_labels([("bbu基带处理单元/华为", "bbu基带处理单元/光纤")], SCHEME)
    assert levels["property"]["confusion"] == {"华为": {"光纤": 1}}
    assert levels["status"]["confusion"] == {}


@pytest.mark.parametrize(
    ("scheme", "truth", "said", "scores"),
    [
        (SCHEME, "标签贴纸/清晰", "标签贴纸/模糊", {"type": 1.0, "property": 1.0, "class_aware": 0.0}),
        (
            WITHOUT_PROPERTY,
            "螺丝连接点/连接正确",
            "螺丝连接点/连接错误",
            {"type": 1.0, "property": 1.0, "class_aware": 0.0},
        ),
        (SCHEME, "线缆/光纤", "线缆/非光纤", {"type": 1.0, "property": 0.0, "class_aware": 0.0}),
        (SCHEME, "线缆/光纤", "电缆/光纤", {"type": 0.0, "property": 0.0, "class_aware": 0.0}),
        (SCHEME, "线缆/光纤/松动", "线缆/光纤/松动/破损", {"type": 1.0, "property": 1.0, "class_aware": 0.0}),
    ],
)
def test_boxes_are_compared_down_to_the_levels_of_their_labels(
    scheme: LabelScheme, truth: str, said: str, scores: dict[str, float]
):
    views = [View(("a",), (thing(0, truth),))]
    detection = evaluate_predictions(views, [Prediction("a", (thing(0, said),))], scheme, resamples=0).detection
    f1 = {name: row["f1@0.50"] for name, row in detection.items()}
    assert f1 == {"class_agnostic": 1.0, **scores}
