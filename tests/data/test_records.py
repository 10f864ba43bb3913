"""The records of a run are checked whole before anything begins: at `--validate-only`, at the start, in an eval."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bbu.data.records import check_records
from bbu.errors import DataError
from bbu.train import main
from tests.data.conftest import view, write_jsonl


def test_records_that_are_not_there_yet_are_no_finding(make_config: Callable, data_root: Path):
    for name in ("train.jsonl", "val.jsonl", "teacher.jsonl"):
        check_records(make_config(), validates=True)
        (data_root / name).unlink()
    check_records(make_config(), validates=True)


def test_the_findings_of_all_files_come_at_once(make_config: Callable, data_root: Path):
    write_jsonl(data_root / "train.jsonl", [view("images/s0.jpg"), view("images/s0.jpg") | {"width": "112"}])
    write_jsonl(data_root / "val.jsonl", [view("images/s1.jpg"), view("images/s1.jpg")])
    (data_root / "images/t0.jpg").unlink()
    with pytest.raises(DataError) as caught:
        check_records(make_config(), validates=True)
    train, val, teacher = str(caught.value).splitlines()
    assert "train.jsonl:2: 'width' must be" in train and "val.jsonl:2: 'images/s1.jpg' is listed in line 1" in val
    assert "teacher.jsonl: 1 images are missing, for example images/t0.jpg (line 1)" in teacher


def test_files_that_the_training_does_not_read_are_not_checked(make_config: Callable, data_root: Path):
    for name in ("val.jsonl", "teacher.jsonl"):
        (data_root / name).write_text("x\n")
    check_records(make_config(teacher_ratio=0.0, eval_teacher_ratio=0.0), validates=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(json.dumps(view("螺.jpg"), ensure_ascii=False), encoding="gbk"),
        lambda path: path.write_text(json.dumps(view("a.jpg")), encoding="utf-16"),
        lambda path: path.write_text(json.dumps(view("a.jpg"))[:-9]),
        lambda path: path.write_text(json.dumps(view("a.jpg") | {"objects": [{"bbox_2d": ["1"] * 4, "desc": "x"}]})),
        lambda path: path.write_text(json.dumps(view("/etc/hostname"))),
        lambda path: path.write_text(""),
        Path.mkdir,
        os.mkfifo,
    ],
    ids=["GBK", "UTF-16", "cut", "texts for numbers", "outside", "empty", "folder", "FIFO"],
)
def test_validate_only_refuses_records_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Path], object]):
    spoil(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl") as caught:
        main(["--config", "smoke", "--validate-only", "--set", f"data_root={tmp_path}"])
    assert "\n" not in str(caught.value)
