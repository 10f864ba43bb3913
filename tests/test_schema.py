"""A JSONL record is checked at the edge: what is accepted, what is refused and how."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bbu.errors import DataError
from bbu.schema import (
    dump_line,
    parse_record,
    photos_hash_path,
    read_distinct_records,
    read_photos_hash,
    read_records,
)

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
        ({"objects": [OBJECT | {"bbox_2d": [0.1, 0.2, 0.5, 0.9]}]}, "narrower than one pixel; .* not shares"),
        ({"objects": [OBJECT | {"bbox_2d": [30, 2, 1, 40]}]}, "empty or inverted"),
        ({"objects": [OBJECT | {"bbox_2d": [1, 2, 3]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"bbox_2d": [True, 2, 3, 4]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"desc": " "}]}, "non-empty 'desc'"),
        ({"objects": [OBJECT | {"desc": 7}]}, "non-empty 'desc'"),
        ({"objects": [OBJECT | {"bbox_2d": ["1", "2", "30", "40"]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"bbox_2d": [[1, 2], [30, 40]]}]}, "four finite numbers"),
        ({"objects": [OBJECT | {"bbox_2d": [1, 2, int("9" * 301), 40]}]}, "a number of 301 digits"),
        ({"objects": [OBJECT | {"desc": "\ud83d"}]}, "half of a surrogate pair"),
        ({"objects": [[1, 2, 30, 40]]}, "needs 'bbox_2d'"),
        ({"objects": {"bbox_2d": [1, 2, 30, 40]}}, "'objects' must be a list"),
        ({"images": [""]}, "non-empty list"),
        ({"images": ["a\0b"]}, "no possible file name"),
        ({"images": ["螺" * 86]}, "no possible file name"),
        ({"images": ["a/" * 600]}, "no possible file name"),
        ({"width": "56"}, "'width' must be a whole number"),
        ({"width": True}, "'width' must be a whole number"),
        ({"height": 84.5}, "'height' must be a whole number"),
        ({"height": 0}, "'height' must be a whole number"),
        ({"height": 10**20}, "'height' must be a whole number"),
        ({"height": None}, "only one of 'width' and 'height'"),
        ({"student": [], "teachers": []}, "student: expected an object"),
        ({"student": PLAIN, "teachers": None}, "'teachers' must be a list"),
        ({"student": PLAIN, "teachers": [PLAIN, 3]}, r"teachers\[1\]: expected an object"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(change: dict, message: str):
    with pytest.raises(DataError, match=message) as caught:
        parse(PLAIN | change)
    assert str(caught.value).startswith("f.jsonl:1") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_json_that_holds_nan_is_refused(constant: str):
    with pytest.raises(DataError, match="not a JSON number"):
        parse_record(f'{{"images": ["a"], "objects": [], "width": {constant}}}', "f.jsonl:1")


def test_a_broken_line_names_file_and_line(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON"):
        list(read_records(path))


def lines_of(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (lines_of(PLAIN, PLAIN)[:-30], r":2: not JSON: .* at column \d+"),
        (lines_of(PLAIN) + b"\n[1, 2]\n", ":3: a record must be a JSON object, not list"),
        (lines_of(PLAIN) + b"[" * 5000 + b"\n", ":2: nested deeper"),
        (lines_of(PLAIN).decode().encode("gbk"), ":1: not UTF-8 at byte"),
        (lines_of(PLAIN).decode().encode("utf-16"), ":1: UTF-16; save the file as UTF-8"),
        (lines_of(PLAIN).decode().encode("utf-16-le"), ":1: (holds zero bytes|not UTF-8)"),
        (lines_of(PLAIN) + bytes(4096), ":2: holds zero bytes"),
        (lines_of(PLAIN).replace(b"\n", b"\r") * 2, ":1: not JSON: Extra data"),
        (b"x" * (16 * 2**20 + 1), ":1: a line of more than"),
    ],
    ids=["cut", "list", "deep", "GBK", "UTF-16", "UTF-16 without a mark", "zeros", "no newlines", "no JSONL"],
)
def test_a_file_that_is_damaged_is_named_with_its_line(tmp_path: Path, content: bytes, finding: str):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.jsonl{finding}") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl: (not a plain|no such) file"):
        list(read_records(tmp_path / "train.jsonl"))


def test_several_damaged_lines_are_listed_together_up_to_a_bound(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines_of(PLAIN, 1, PLAIN, 2))
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "4"]
    path.write_bytes(lines_of(*range(1000)))
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert len(str(caught.value).splitlines()) == 11


def test_unusual_texts_a_byte_order_mark_and_empty_lines_are_read(tmp_path: Path):
    desc = "标签贴纸/a\u2028b\x85c\x0cd😀"
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + lines_of(PLAIN | {"objects": [OBJECT | {"desc": desc}]}) + b"\r\n \n" + lines_of(PLAIN)
    )
    first, second = read_records(path)
    assert first.student.objects[0].desc == desc and second.student.objects[0].desc == OBJECT["desc"]


@pytest.mark.parametrize("spelling", ["p/a.jpeg", "./p/a.jpeg", "p//a.jpeg", "p/./a.jpeg", "link/a.jpeg", "other.jpeg"])
@pytest.mark.parametrize("photo_is_there", [True, False])
def test_a_photo_listed_twice_is_refused_with_both_lines(tmp_path: Path, spelling: str, photo_is_there: bool):
    (tmp_path / "p").mkdir()
    (tmp_path / "link").symlink_to("p")
    if photo_is_there:
        (tmp_path / "p/a.jpeg").touch()
        os.link(tmp_path / "p/a.jpeg", tmp_path / "other.jpeg")
    records = [PLAIN | {"images": [name]} for name in ("p/a.jpeg", "p/b.jpeg", spelling)]
    (tmp_path / "val.jsonl").write_bytes(b"\n" + lines_of(*records))
    if photo_is_there or spelling not in ("link/a.jpeg", "other.jpeg"):
        with pytest.raises(DataError, match=r"val\.jsonl:4: '.*\.jpeg' is listed in line 2 already"):
            read_distinct_records(tmp_path / "val.jsonl", tmp_path)
    else:
        assert len(read_distinct_records(tmp_path / "val.jsonl", tmp_path)) == 3


def test_the_hash_over_photos_lies_beside_the_records_and_may_be_missing(tmp_path: Path):
    records = tmp_path / "val.jsonl"
    assert photos_hash_path(records) == tmp_path / "val.photos.sha256"
    assert read_photos_hash(records) is None
    photos_hash_path(records).write_text("c0ffee\n")
    assert read_photos_hash(records) == "c0ffee"
    for content in (b"\xff\xfe", b"<html>", b"0" * 10_000 + b"x"):
        photos_hash_path(records).write_bytes(content)
        with pytest.raises(DataError, match=r"val\.photos\.sha256: holds no hash"):
            read_photos_hash(records)
