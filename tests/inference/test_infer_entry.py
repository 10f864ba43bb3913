"""`python -m bbu.infer`: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from bbu.errors import CheckpointError, DataError, run_entry
from bbu.infer import main


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def infer(checkpoint: Path, *arguments: str) -> int:
    return main([*arguments, "--checkpoint", str(checkpoint)])


def test_a_folder_gives_a_line_and_a_picture_for_each_photo_and_one_that_cannot_be_read_says_so(
    published: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "notes.txt").touch()
    assert infer(published, str(photos)) == DataError.exit_code
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(line["images"][0]).name for line in lines] == ["a.png", "b.png", "c.png", "d.png"]
    assert [line["status"] for line in lines] == ["ok", "failed", "ok", "ok"]
    assert "b.png: cannot be read" in lines[1]["error"] and lines[1]["objects"] == []
    assert (
        lines[0]["source"] == "head" and lines[0]["objects"] and (lines[0]["width"], lines[0]["height"]) == (168, 168)
    )
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["a.png", "c.png", "d.png"]
    notices = printed.err.splitlines()
    assert all(line.startswith("bbu.infer: ") for line in notices)
    assert "left out 1 files that are no photos (.txt 1)" in notices[0] and "detection head" in notices[1]
    assert notices[-1] == "bbu.infer: 4 photos: 3 ok, 1 failed; pictures in predictions"


def test_the_answers_status_is_in_the_line_and_in_the_summary(
    published: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    assert infer(published, str(photos / "a.png"), "--source", "answer") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["status"] == "truncated"
    assert "1 photos: 1 truncated; truncated answers end at generation_max_new_tokens" in printed.err


def test_a_second_run_does_not_take_its_own_pictures_for_photos(
    published: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (photos / "b.png").unlink()
    monkeypatch.chdir(photos)
    for _ in range(2):
        assert infer(published, ".") == 0
        assert len(capsys.readouterr().out.splitlines()) == 3


def test_photos_of_the_same_name_get_pictures_of_their_own(published: Path, photos: Path, tmp_path: Path):
    (photos / "sub").mkdir()
    for name in ("a.jpg", "sub/a.png", "sub/a.jpg"):
        Image.new("RGB", (60, 60)).save(photos / name)
    places = [str(photos / name) for name in ("a.png", "a.jpg", "sub/a.png", "sub/a.jpg")]
    assert infer(published, *places, "--out", "drawn/deep") == 0
    names = sorted(path.name for path in (tmp_path / "drawn/deep").iterdir())
    assert names == ["a.jpg-2.png", "a.jpg.png", "a.png", "a.png.png"]


def test_a_name_that_is_no_utf8_survives_the_way_through_json(
    published: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    name = os.fsdecode("照片.png".encode("gbk"))
    (photos / "a.png").rename(photos / name)
    run_entry(partial(infer, published, str(photos / name)), exit_process=lambda code: None)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["images"] == [str(photos / name)] and line.encode()


def test_what_cannot_be_right_is_refused_before_a_model_is_loaded(photos: Path, tmp_path: Path):
    for places, reason in (
        (["absent.jpg", "gone.png"], r"no such photo: absent\.jpg, gone\.png"),
        ([str(photos), "*.nothing"], r"\*\.nothing: no photos there"),
    ):
        with pytest.raises(DataError, match=reason):
            infer(tmp_path / "no-checkpoint", *places)
    with pytest.raises(CheckpointError, match="no-checkpoint"):
        infer(tmp_path / "no-checkpoint", str(photos))
