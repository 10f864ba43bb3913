"""The predictions file as evaluation reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbu.errors import DataError
from bbu.evaluation.predictions import Prediction, read_predictions
from bbu.schema import BBUObject

GOOD = {
    "image": "a",
    "width": 10,
    "height": 20,
    "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": "x", "score": None}],
    "status": "ok",
    "score_source": None,
    "rejected": {"bad_box": 1},
    "text": "…\u2028…",
}


def write(path: Path, *records: object) -> Path:
    # Escaped where UTF-8 has no word for it: half of a surrogate pair.
    lines = [json.dumps(r, ensure_ascii="\\ud83d" in json.dumps(r)) + "\n" for r in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_record_is_read_whole_whatever_line_separators_its_text_holds(tmp_path):
    expected = Prediction("a", (BBUObject((1, 2, 3, 4), "x"),), (None,), "ok", None, 10, 20, {"bad_box": 1})
    assert read_predictions(write(tmp_path / "predictions.jsonl", GOOD)) == [expected]


def with_object(**change: object) -> dict:
    return GOOD | {"objects": [GOOD["objects"][0] | change]}


@pytest.mark.parametrize(
    "bad",
    [
        GOOD | {"status": "fine"},
        {k: v for k, v in GOOD.items() if k != "image"},
        GOOD | {"objects": None},
        with_object(bbox_2d="1234"),
        with_object(bbox_2d=[3, 2, 1, 4]),
        with_object(bbox_2d=[1, 2, float("nan"), 4]),
        with_object(bbox_2d=[1, 2, 10**400, 4]),
        with_object(bbox_2d=[1, 2, 1e300, 4]),
        with_object(bbox_2d=["1", "2", "3", "4"]),
        with_object(bbox_2d=[True, 2, 3, 4]),
        with_object(bbox_2d=[[1, 2], [3, 4]]),
        with_object(desc=5),
        with_object(desc="\ud83d"),
        with_object(score=float("nan")),
        with_object(score="0.5"),
        with_object(score=True),
        GOOD | {"objects": [3]},
        GOOD | {"image": 3},
        GOOD | {"width": "10"},
        GOOD | {"rejected": {"bad_box": "1"}},
        [GOOD],
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, bad: object):
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: "):
        read_predictions(write(tmp_path / "predictions.jsonl", GOOD, bad))


def test_a_torn_last_line_is_refused(tmp_path):
    path = write(tmp_path / "predictions.jsonl", GOOD)
    path.write_text(path.read_text() + '{"image": "b", "obj')
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: "):
        read_predictions(path)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_another_encoding_is_refused_with_file_and_line(tmp_path: Path, encoding: str):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(GOOD | {"image": "螺丝"}, ensure_ascii=False).replace("…\u2028…", ""), encoding=encoding)
    with pytest.raises(DataError, match=r"predictions\.jsonl:1: .*not UTF-8"):
        read_predictions(path)


def test_a_missing_file_is_a_one_line_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(tmp_path / "none.jsonl")
