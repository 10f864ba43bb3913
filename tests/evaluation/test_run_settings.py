"""Whether an evaluation was done on a run's own validation file and under its own settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bbu.evaluation.run_settings import RunSettings
from bbu.run.folder import RunFolder
from bbu.schema import photos_hash_path

SETTINGS = {"eval_prompt": "detailed", "max_eval_examples": -1, "eval_iou_threshold": 0.5, "seed": 1}


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


VAL, LATER, TRAIN = (hash_of(text) for text in ("val\n", "later\n", "train\n"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose validation file holds `val` and was recorded at its start."""
    made = RunFolder(tmp_path / "output-a").create()
    data = {"data_root": str(tmp_path), "val_file": "val.jsonl"}
    made.config.write_text(yaml.safe_dump(SETTINGS | data))
    made.provenance.write_text(json.dumps({"starts": [{"data_sha256": {"val.jsonl": VAL, "train.jsonl": TRAIN}}]}))
    (tmp_path / "val.jsonl").write_text("val\n")
    return made


def record(**changes: Any) -> dict[str, Any]:
    return {"dataset_sha256": VAL, "teachers": 0, "config": SETTINGS} | changes


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({}, ()),
        ({"dataset_sha256": TRAIN}, ("val_file",)),
        ({"dataset_sha256": LATER}, ("val_file",)),
        ({"teachers": 2}, ("teachers",)),
        ({"config": SETTINGS | {"eval_prompt": "concise"}}, ("eval_prompt",)),
        ({"config": SETTINGS | {"max_eval_examples": 8}, "teachers": 1}, ("max_eval_examples", "teachers")),
        ({"config": SETTINGS | {"seed": 2}}, ()),
        ({"config": {"eval_iou_threshold": 0.75}}, ("eval_iou_threshold",)),
    ],
)  # fmt: skip
def test_what_differs_from_the_run_is_named(run: RunFolder, changes: dict[str, Any], differences: tuple[str, ...]):
    assert sorted(RunSettings.of_run(run).differences(record(**changes))) == sorted(differences)


@pytest.mark.parametrize("content", [{}, {"config": None}, {"config": [1]}, {"config": {}, "dataset_sha256": None}])
def test_what_an_older_file_does_not_state_is_no_difference(run: RunFolder, content: dict[str, Any]):
    assert RunSettings.of_run(run).differences(content) == ()


def test_a_validation_file_that_changed_since_the_run_is_another_one(run: RunFolder, tmp_path: Path):
    (tmp_path / "val.jsonl").write_text("later\n")
    settings = RunSettings.of_run(run)
    assert settings.differences(record()) == ()
    assert settings.differences(record(dataset_sha256=LATER)) == ("val_file",)


def test_a_start_that_failed_on_other_data_does_not_make_the_scores_foreign(run: RunFolder):
    starts = [{"data_sha256": {"val.jsonl": value}} for value in (VAL, TRAIN)]
    run.provenance.write_text(json.dumps({"starts": [*starts, "no start", {"data_sha256": {}}]}))
    assert RunSettings.of_run(run).differences(record()) == ()


def test_without_a_record_the_file_as_it_is_counts_and_without_that_its_name(run: RunFolder, tmp_path: Path):
    run.provenance.unlink()
    assert RunSettings.of_run(run).differences(record(dataset_sha256=TRAIN)) == ("val_file",)
    (tmp_path / "val.jsonl").unlink()
    settings = RunSettings.of_run(run)
    assert settings.differences(record(val_file="val.jsonl")) == ()
    assert settings.differences(record(val_file="train.jsonl")) == ("val_file",)


def test_other_photos_under_equal_records_are_other_photos(run: RunFolder, tmp_path: Path):
    photos_hash_path(tmp_path / "val.jsonl").write_text("c0ffee\n")
    settings = RunSettings.of_run(run)
    assert settings.differences(record(photos_sha256="c0ffee")) == ()
    assert settings.differences(record(photos_sha256="decade")) == ("photos",)


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json"])
def test_a_damaged_file_of_the_run_is_logged_and_nothing_is_compared_with_it(
    run: RunFolder, name: str, caplog: pytest.LogCaptureFixture
):
    (run.root / name).write_text("[" * 9000)
    assert RunSettings.of_run(run).differences(record(dataset_sha256=TRAIN)) == ()
    assert name in caplog.text


def test_a_folder_without_a_config_compares_nothing(tmp_path: Path):
    assert RunSettings.of_run(RunFolder(tmp_path)).differences(record()) == ()
