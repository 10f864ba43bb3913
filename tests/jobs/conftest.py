"""What the tests about submitted runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bbu.jobs.records import append_records
from bbu.run.folder import RunFolder
from tests.jobs.runs import record_of_job


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was submitted as job 7, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "output-a").create()
    folder.config.write_text(yaml.safe_dump({"seed": 1, "llm_lr": 1e-5, "run_name": "a"}))
    append_records(folder, [record_of_job("train", "7", tmp_path / "jobs/1-train")])
    return folder
