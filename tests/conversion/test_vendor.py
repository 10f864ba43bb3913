"""Reading the vendor's JSON: both dialects, and a fixed reason for everything that cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import read_photo

INFO = {"width": 100, "height": 50, "depth": 3}
LABEL = {"contentZh": {"标签": "BBU品牌/华为"}}


def read(data: Any):
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return read_photo("p", text.encode())


def dialect_b(coordinates: Any, properties: Any = LABEL) -> dict[str, Any]:
    feature = {"geometry": {"type": "ExtentPolygon", "coordinates": coordinates}, "properties": properties}
    return {"info": INFO, "statistcs": {"x": 1}, "markResult": {"type": "FeatureCollection", "features": [feature]}}


@pytest.mark.parametrize("corners", [[[1, 2], [30, 40]], [[30, 40], [1, 2]], [[30, 2], [1, 40]]])
def test_dialect_a_takes_opposite_corners_in_any_order(corners: list) -> None:
    photo = read({"info": INFO, "dataList": [{"coordinates": corners, "properties": LABEL}]})
    assert (photo.dialect, photo.width, photo.height) == ("A", 100, 50)
    assert photo.objects[0].box == (1, 2, 30, 40)
    assert photo.objects[0].content_zh == {"标签": "BBU品牌/华为"}


@pytest.mark.parametrize("nested", [False, True])
def test_dialect_b_takes_flat_and_nested_rings_of_floats(nested: bool) -> None:
    ring = [[1.5, 2], [30.25, 2], [30.25, 40], [1.5, 40], [1.5, 2]]
    photo = read(dialect_b([ring] if nested else ring))
    assert photo.dialect == "B" and photo.objects[0].box == (1.5, 2, 30.25, 40)


def test_flat_properties_are_read_as_the_language_of_their_label_key() -> None:
    item = {"coordinates": [[0, 0], [9, 9]], "properties": {"标签": "线缆/光纤", "颜色": "黄"}}
    photo = read({"info": INFO, "dataList": [item]})
    assert photo.objects[0].content_zh == {"标签": "线缆/光纤", "颜色": "黄"} and not photo.objects[0].content


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"info": ', "broken_json"),
        ("[]", "broken_json"),
        ('{"info": {"width": NaN, "height": 5}, "dataList": []}', "non_finite_number"),
        ({"dataList": []}, "missing_size"),
        ({"info": {"width": 0, "height": 5}, "dataList": []}, "missing_size"),
        ({"info": {"width": "9 px", "height": 5}, "dataList": []}, "missing_size"),
        ({"info": {"width": True, "height": 5}, "dataList": []}, "missing_size"),
        ({"info": {"width": 9.5, "height": 5}, "dataList": []}, "missing_size"),
        ({"info": INFO}, "unknown_dialect"),
        ({"info": INFO, "dataList": {}}, "unknown_dialect"),
        ({"info": INFO, "markResult": {"type": "FeatureCollection"}}, "unknown_dialect"),
        ({"info": INFO, "dataList": None, "markResult": []}, "unknown_dialect"),
        ({"info": INFO, "dataList": [], "markResult": [{"geometry": {}}]}, "unknown_dialect"),
        ({"info": INFO, "dataList": [], "markResult": {"items": [{"geometry": {}}]}}, "unknown_dialect"),
        ({"info": INFO, "dataList": {"0": {}}, "markResult": {"features": []}}, "unknown_dialect"),
    ],
)
def test_unusable_file_is_rejected_with_its_reason(data: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "bad",
    [
        None, [], [[1, 2]], [[1, "x"], [2, 3]], [[1, "1,5"], [2, 3]], [[1, "nan"], [2, 3]], [[1, True], [2, 3]],
        [[1, 1e999], [2, 3]], [[1, 10**20], [2, 3]], "1,2,3,4", [1, 2, 3, 4], [{"x": 1, "y": 2}, {"x": 3, "y": 4}],
    ],
)  # fmt: skip
def test_bad_coordinates_reject_the_object_and_keep_the_photo(bad: Any) -> None:
    text = json.dumps(dialect_b(bad)).replace("Infinity", "1e999")
    photo = read(text)
    assert [(r.index, r.reason) for r in photo.rejects] == [(0, "bad_coordinates")] and not photo.objects


@pytest.mark.parametrize("corners", [[["1", " 2 "], ["30.0", "4e1"]], [[1, 2], [30, 2], [30, 40], [1, 40]]])
def test_numbers_may_be_texts_and_dialect_a_may_name_all_corners(corners: list) -> None:
    info = {"width": "100", "height": "50"}
    photo = read({"info": info, "dataList": [{"coordinates": corners, "properties": LABEL}]})
    assert (photo.width, photo.height) == (100, 50) and photo.objects[0].box == (1, 2, 30, 40)


def in_both_dialects(box_a: list, box_b: list, label_b: str = "BBU品牌/华为") -> dict[str, Any]:
    list_a = [{"coordinates": box, "properties": LABEL} for box in box_a]
    features = [{"geometry": {"coordinates": box}, "properties": {"contentZh": {"标签": label_b}}} for box in box_b]
    return {"info": INFO, "dataList": list_a, "markResult": {"features": features}}


FIRST, SECOND = [[1, 2], [30, 40]], [[5, 6], [70, 40]]


@pytest.mark.parametrize(
    ("data", "dialect", "objects"),
    [
        (in_both_dialects([], [FIRST]), "B", 1),
        (in_both_dialects([FIRST], []), "A", 1),
        (in_both_dialects([], []), "A", 0),
        (in_both_dialects([FIRST], []) | {"markResult": "done"}, "A", 1),
        ({"info": INFO, "dataList": None, "markResult": {"features": [], "type": None}}, "B", 0),
        (in_both_dialects([FIRST, SECOND], [SECOND, [[1.4, 2.2], [30, 40]]]), "A", 2),
    ],
)
def test_of_two_lists_the_filled_one_counts_and_two_that_agree_are_one(data, dialect, objects) -> None:
    photo = read(data)
    assert (photo.dialect, len(photo.objects)) == (dialect, objects)


@pytest.mark.parametrize(
    "data",
    [
        in_both_dialects([FIRST], [SECOND]),
        in_both_dialects([FIRST], [FIRST, SECOND]),
        in_both_dialects([FIRST], [FIRST], "BBU品牌/中兴"),
    ],
)
def test_two_lists_that_differ_reject_the_photo(data: Any) -> None:
    with pytest.raises(Unusable) as caught:
        read(data)
    assert caught.value.reason == "two_annotations"


def test_bad_object_keeps_its_neighbours() -> None:
    good = {"coordinates": [[0, 0], [9, 9]], "properties": LABEL}
    photo = read({"info": INFO, "dataList": ["junk", good, {"coordinates": [[0, 0], [1, 1]]}]})
    assert [item.index for item in photo.objects] == [1]
    assert [(r.index, r.reason) for r in photo.rejects] == [(0, "bad_object"), (2, "bad_object")]
