"""Which paths of a run config are missing on this machine: all of them at once, each by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.config.paths import missing_paths
from bbu.config.read import load_config


def lines_for(folder: Path, *overrides: str) -> list[str]:
    """What is missing for the smoke config with all its paths in `folder`, which is left out of the lines."""
    places = {"model_path": "model", "data_root": "data", "vendor_dir": "vendor", "output_root": "runs"}
    settings = [f"{key}={folder / name}" for key, name in places.items()]
    return [
        line.replace(f"{folder}/", "")
        for line in missing_paths(load_config("smoke", overrides=[*settings, *overrides]))
    ]


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A folder with all that the smoke config reads."""
    for name in ("model", "vendor", "data/ds_rescaled"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("train.jsonl", "val.jsonl", "teacher.jsonl"):
        (tmp_path / "data" / name).touch()
    return tmp_path


def test_nothing_is_reported_where_all_is_there(complete: Path):
    assert lines_for(complete) == []


def test_everything_that_is_missing_is_reported_at_once(tmp_path: Path):
    overrides = [
        "label_hierarchy_file=hierachy_zh",
        "token_map_file=maps",
        "deepspeed_enabled=true",
        "deepspeed_config=z",
    ]
    model, data, vendor, labels, tokens, deepspeed = lines_for(tmp_path, *overrides)
    assert model == "model_path model: no such folder"
    assert data == "data_root data: no such folder (`python -m bbu.convert` writes it)"
    assert vendor == "vendor_dir vendor: no such folder (a conversion alone reads it)"
    assert labels.startswith("label_hierarchy_file: ") and "did you mean 'hierarchy_zh'?" in labels
    assert tokens.startswith("token_map_file: ") and deepspeed == "deepspeed_config z: no such file"


@pytest.mark.parametrize(("name", "key"), [("train.jsonl", "train_file"), ("val.jsonl", "val_file")])
def test_each_file_of_records_is_named_by_its_key(complete: Path, name: str, key: str):
    (complete / "data" / name).unlink()
    assert lines_for(complete) == [f"{key} data/{name}: no such file"]


def test_teachers_are_looked_for_only_where_samples_get_any(complete: Path):
    (complete / "data/teacher.jsonl").unlink()
    assert lines_for(complete, "num_teacher_samples=0") == []
    assert lines_for(complete, "num_teacher_samples=1") == ["teacher_file data/teacher.jsonl: no such file"]


def test_a_file_in_the_place_of_a_folder_is_called_one(complete: Path):
    (complete / "model").rmdir()
    (complete / "model").touch()
    (complete / "runs").touch()
    assert lines_for(complete) == ["model_path model: a file, not a folder", "output_root runs: runs is a file"]


def test_the_shipped_deepspeed_files_are_found_from_any_folder(complete: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(complete)
    assert lines_for(complete, "deepspeed_enabled=true", "deepspeed_config=configs/deepspeed/zero2.json") == []


def test_label_files_are_read(complete: Path):
    (complete / "labels.yaml").write_text("bbu: huawei\n")
    (line,) = lines_for(complete, f"label_hierarchy_file={complete}/labels.yaml")
    assert "'bbu' must list its properties" in line


def test_the_package_of_an_optimizer_that_is_missing_is_reported(complete: Path):
    assert lines_for(complete, "optim=adamw_anyprecision") == [
        "optim adamw_anyprecision: the Python package torchdistx is not installed"
    ]
