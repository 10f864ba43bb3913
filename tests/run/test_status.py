"""status.json: typed, replaced whole, and still read when another version wrote it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status, write_status

FULL = RunStatus(
    phase="training", step=3, max_steps=6, epoch=0.5, seconds_left=None, checkpoint_step=3, heartbeat=1.5, host="vm",
    pid=7, stale_after_s=60.0, loss=0.25, samples_per_second=2.0, tokens_per_second=1e3, job={"SLURM_JOB_ID": "8"},
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


def test_a_status_round_trips_and_leaves_no_other_file(run: RunFolder):
    assert read_status(run) == RunStatus()
    write_status(run, RunStatus(phase="failed"))
    write_status(run, FULL)
    assert read_status(run) == FULL
    assert sorted(p.name for p in run.root.iterdir()) == ["eval", "logs", "status.json", "tensorboard"]


def test_the_file_is_flat_and_unknown_values_are_null_but_for_what_is_not_logged_yet(run: RunFolder):
    write_status(run, FULL)
    assert json.loads(run.status.read_text())["SLURM_JOB_ID"] == "8"
    write_status(run, RunStatus(phase="training", loss=float("nan"), epoch=float("inf")))
    assert json.loads(run.status.read_text()) == {
        "phase": "training", "step": None, "max_steps": None, "epoch": None, "seconds_left": None,
        "checkpoint_step": None, "heartbeat": None, "host": None, "pid": None, "stale_after_s": None,
    }  # fmt: skip


def test_fields_of_another_version_are_ignored_and_missing_ones_are_none(run: RunFolder):
    run.status.write_text('{"phase": "completed", "mood": "good", "SLURM_RESTART_COUNT": "2"}')
    assert read_status(run) == RunStatus(phase="completed", job={"SLURM_RESTART_COUNT": "2"})
    assert read_status(run).restart_count == 2


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_file_is_an_error_that_names_it(run: RunFolder, text: str):
    run.status.write_text(text)
    with pytest.raises(CheckpointError, match=r"status\.json: not (a )?JSON"):
        read_status(run)


def test_a_reader_never_sees_half_a_status(run: RunFolder):
    write_status(run, RunStatus(phase=""))
    done = threading.Event()

    def rewrite() -> None:
        for n in range(60):
            write_status(run, RunStatus(phase="x" * (n * 1000)))
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert set(read_status(run).phase or "") <= {"x"}
    writer.join()


def test_a_stop_of_an_older_version_is_no_preemption(run: RunFolder):
    run.status.write_text('{"phase": "preempted", "step": 3}')
    assert (read_status(run).state, read_status(run).step) == ("stopped", 3)


def test_the_state_names_the_reason_of_a_failure():
    assert RunStatus(phase="failed to start", reason="no such file").state == "failed to start: no such file"
    assert RunStatus(phase="training").state == "training" and RunStatus().state is None
