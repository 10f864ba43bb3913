"""The run folder: where each file of a run lies, and how checkpoints are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


def test_the_folder_is_named_after_the_run(tmp_path: Path):
    run = RunFolder.of(tmp_path, "demo")
    assert run.root == tmp_path / "output-demo"
    assert run.checkpoint(30) == run.root / "checkpoint-30"
    assert not run.root.exists()


def test_steps_are_ordered_by_number_and_only_published_names_count(run: RunFolder):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-007", ".saving-checkpoint-30", "checkpoint-x"):
        (run.root / name).mkdir()
    (run.root / "checkpoint-40").write_text("a file")
    assert run.steps() == [20, 100]


@pytest.mark.parametrize("mark", ["config.yaml", "jobs.jsonl", "status.json"])
@pytest.mark.parametrize("name", ["demo", "output-demo", "output-demo/", "./demo", "{root}/demo", "{root}/output-demo"])
def test_a_run_is_found_by_the_name_that_status_prints_and_by_its_folder(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mark: str
):
    monkeypatch.chdir(tmp_path)
    (run.root / mark).touch()
    assert RunFolder.existing(name.format(root=tmp_path)) == run
    assert run.name == "demo"


def test_a_run_is_found_from_inside_of_its_folder(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.config.touch()
    monkeypatch.chdir(run.root)
    assert RunFolder.existing(".") == run


def test_an_unknown_run_names_the_nearest_one_or_those_that_there_are(run: RunFolder, tmp_path: Path):
    run.config.touch()
    for name, advice in (("demmo", "did you mean 'demo'?"), ("output-deno", "did you mean 'demo'?"), ("x", "are demo")):
        with pytest.raises(CheckpointError, match=f"not a run folder; .*{re.escape(advice)}"):
            RunFolder.existing(tmp_path / name)
    run.checkpoint(3).mkdir()
    with pytest.raises(CheckpointError, match="a checkpoint of one; name the folder that it is in"):
        RunFolder.existing(run.checkpoint(3))
    (tmp_path / "loop").symlink_to("loop")
    for name in ("/", tmp_path / "loop"):
        with pytest.raises(CheckpointError, match="not a run folder"):
            RunFolder.existing(name)
