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


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
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
        with_object(score=float("nan")),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, bad: dict):
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: "):
        read_predictions(write(tmp_path / "predictions.jsonl", GOOD, bad))


def test_a_torn_last_line_is_refused(tmp_path):
    path = write(tmp_path / "predictions.jsonl", GOOD)
    path.write_text(path.read_text() + '{"image": "b", "obj')
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: "):
        read_predictions(path)


def test_a_missing_file_is_a_one_line_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(tmp_path / "none.jsonl")
