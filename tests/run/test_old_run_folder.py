"""A run folder that version 0.1 wrote is still read, scored and resumed.

`old_run_folder` is one of the smoke config: two checkpoints scored, the second one left, without weights, and sealed
by that version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bbu.config.read import load_recorded_config
from bbu.evaluation.metrics import EvaluationResult
from bbu.evaluation.pending import metrics_files, open_ledger, unscored_steps
from bbu.evaluation.scores import best_scores, latest_scores
from bbu.inference.scoring import CheckpointScorer
from bbu.jobs.records import read_records
from bbu.jobs.run_status import view_runs
from bbu.jobs.status_report import status_dict, status_row
from bbu.run.checkpoints import newest, verify
from bbu.run.folder import RUN_CONFIG, RunFolder
from bbu.run.lease import Owner, held_lease
from bbu.run.provenance import record_start
from bbu.run.status import read_status
from tests.checkpoints import publishing
from tests.commands import Demo


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    source = Path(__file__).with_name("old_run_folder")
    return RunFolder(Path(shutil.copytree(source, tmp_path / "output-smoke"))).create()


def test_its_status_is_read_whole(run: RunFolder):
    assert read_status(run).to_dict() == json.loads(run.status.read_text())
    assert (read_status(run).phase, read_status(run).step) == ("completed", 6)


def test_status_shows_it_with_its_scores(run: RunFolder):
    (view,) = view_runs([run])
    row = status_row(view)
    assert (row["step"], row["checkpoint"], row["F1"]) == ("6/6", "6", "answer 0.000")
    assert status_dict(view)["status"]["heartbeat"] == 1795618839.5724733


def test_its_scores_are_read(run: RunFolder):
    assert [(score.step, score.source) for score in latest_scores(run)] == [(6, "answer")]
    assert best_scores(run)["answer"].step == 6
    for step in (3, 6):
        ((_, path),) = metrics_files(run, step)
        content = json.loads(path.read_text(encoding="utf-8"))
        result = EvaluationResult.from_dict(content)
        assert open_ledger(run, 60).result(result.key) == content
        assert content.items() <= result.to_dict().items()
    assert unscored_steps(run) == []


def test_its_checkpoints_can_be_scored_anew_under_the_new_key(run: RunFolder, demo: Demo):
    folder = run.checkpoint(6)
    config = load_recorded_config(folder / RUN_CONFIG, demo.settings)
    work = CheckpointScorer(folder, config, num_teachers=0)._plan("answer")
    claim = open_ledger(run, 60).claim(work.facts.key(), {"step": 6})
    assert claim is not None and unscored_steps(run) == [6]


def test_its_manifest_verifies_and_training_can_resume_from_it(run: RunFolder):
    checkpoint = newest(run)
    assert checkpoint is not None
    assert checkpoint.manifest == verify(run.checkpoint(6))
    with publishing(run, 9) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
    assert run.steps() == [6, 9]


def test_its_lease_can_be_taken(run: RunFolder):
    with held_lease(run, Owner.of_this_process({}), timeout_s=60, interval_s=10) as lease:
        assert lease.generation == 2
        lease.check()


def test_a_start_and_a_job_are_added_to_its_records(run: RunFolder):
    assert [record.name for record in read_records(run)] != []
    record_start(run, {}, [])
    old, new = json.loads(run.provenance.read_text())["starts"]
    assert old["commit"].startswith("5494877") and new.keys() == old.keys()
