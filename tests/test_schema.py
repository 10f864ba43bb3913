"""A JSONL record is checked at the edge: what is accepted, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbu.errors import DataError
from bbu.schema import dump_line, parse_record, photos_hash_path, read_photos_hash, read_records

OBJECT = {"bbox_2d": [1, 2, 30, 40], "desc": "螺丝连接点/BBU安装螺丝/安装正确"}
PLAIN = {"images": ["ds_rescaled/a.jpeg"], "objects": [OBJECT], "width": 56, "height": 84}


def parse(data: object):
    return parse_record(json.dumps(data), "f.jsonl:1")


def test_a_plain_record_has_no_teachers_of_its_own():
    record = parse(PLAIN)
    assert record.teachers is None
    assert record.student.objects[0].bbox_2d == (1, 2, 30, 40)


def test_a_teacher_student_record_keeps_both():
    record = parse({"teachers": [PLAIN], "student": PLAIN})
    assert record.teachers == (record.student,)


def test_a_negative_has_no_objects():
    assert parse(PLAIN | {"objects": []}).student.objects == ()


def test_writing_and_reading_is_the_identity():
    view = parse(PLAIN).student
    assert parse_record(dump_line(view), "x").student == view


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": ["../secret.jpeg"]}, "outside data_root"),
        ({"images": ["/etc/passwd"]}, "outside data_root"),
        ({"images": []}, "non-empty list"),
        ({"objects": [OBJECT | {"bbox_2d": [1, 2, 57, 40]}]}, "leaves the 56x84 image"),
        ({"objects": [OBJECT | {"bbox_2d": [30, 2, 1, 40]}]}, "empty or inverted"),
        ({"objects": [OBJECT | {"bbox_2d": [1, 2, 3]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"bbox_2d": [True, 2, 3, 4]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"desc": " "}]}, "non-empty 'desc'"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(change: dict, message: str):
    with pytest.raises(DataError, match=message) as caught:
        parse(PLAIN | change)
    assert str(caught.value).startswith("f.jsonl:1") and "\n" not in str(caught.value)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_json_that_holds_nan_is_refused(constant: str):
    with pytest.raises(DataError, match="not a JSON number"):
        parse_record(f'{{"images": ["a"], "objects": [], "width": {constant}}}', "f.jsonl:1")


def test_a_broken_line_names_file_and_line(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON"):
        list(read_records(path))


def test_the_hash_over_photos_lies_beside_the_records_and_may_be_missing(tmp_path: Path):
    records = tmp_path / "val.jsonl"
    assert photos_hash_path(records) == tmp_path / "val.photos.sha256"
    assert read_photos_hash(records) is None
    photos_hash_path(records).write_text("c0ffee\n")
    assert read_photos_hash(records) == "c0ffee"
