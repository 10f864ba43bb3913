"""The run folder: where each file of a run lies, and how checkpoints are named."""

from __future__ import annotations

from pathlib import Path

import pytest

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
