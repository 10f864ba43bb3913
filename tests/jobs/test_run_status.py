"""The state of runs, from what a trainer and Slurm report about them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bbu.jobs.records import append_records
from bbu.jobs.run_status import view_runs
from bbu.run.folder import RunFolder
from bbu.run.status import write_status
from tests.conftest import SlurmSays
from tests.jobs.runs import TRAINING, record_of_job, squeue_text


def state(run: RunFolder) -> str:
    return view_runs([run])[0].state


def test_before_its_first_step_a_run_is_what_its_job_is(run: RunFolder, slurm_says: SlurmSays):
    slurm_says("squeue", squeue_text("7 PENDING Priority"))
    assert state(run) == "PENDING (Priority)"


@pytest.mark.parametrize(
    ("phase", "job", "expected"),
    [
        ("completed", "7 COMPLETED", "completed"),
        ("completed", "7 PREEMPTED", "completed"),
        ("stopped", "7 PENDING BeginTime", "stopped, PENDING (BeginTime)"),
        ("failed", "7 FAILED NonZeroExitCode 6:0", "failed, FAILED, exit code 6"),
        ("training", "7 NODE_FAIL", "training, NODE_FAIL"),
        ("training", "7 CANCELLED", "training, CANCELLED"),
    ],
)
def test_the_trainers_word_and_slurms_make_the_state(
    run: RunFolder, slurm_says: SlurmSays, phase: str, job: str, expected: str
):
    write_status(run, replace(TRAINING, phase=phase))
    slurm_says("squeue", squeue_text(job))
    assert state(run) == expected


def test_a_silent_trainer_is_stale_and_lost_when_slurm_has_no_job(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, TRAINING)
    slurm_says("squeue", squeue_text("7 RUNNING"))
    assert not view_runs([run])[0].is_stale
    long_ago = time.time() - 600
    os.utime(run.status, (long_ago, long_ago))
    assert view_runs([run])[0].is_stale
    slurm_says("squeue", "")
    assert state(run) == "lost: no job, no heartbeat"


def test_a_completed_run_is_never_stale(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, phase="completed"))
    os.utime(run.status, (0, 0))
    slurm_says("squeue", "")
    assert not view_runs([run])[0].is_stale and state(run) == "completed"


def test_of_an_array_that_several_runs_share_each_has_its_own_element(run: RunFolder, slurm_says: SlurmSays):
    other = RunFolder(run.root.with_name("output-b")).create()
    for each, element in ((run, 0), (other, 1)):
        append_records(each, [record_of_job("train", "9", run.root.with_name("jobs") / "2", element)])
    slurm_says("squeue", squeue_text("9_0 RUNNING", "9_1 PENDING Resources", "7 COMPLETED"))
    assert [view.state for view in view_runs([run, other])] == ["RUNNING", "PENDING (Resources)"]


def test_a_run_of_an_sbatch_template_is_found_by_what_its_trainer_says(tmp_path: Path, slurm_says: SlurmSays):
    bare = RunFolder(tmp_path / "output-b").create()
    bare.config.write_text("{}")
    write_status(bare, replace(TRAINING, job={"SLURM_JOB_ID": "18"}))
    slurm_says("squeue", squeue_text("18 RUNNING"))
    [view] = view_runs([bare])
    assert view.state == "training, RUNNING" and view.jobs[0].ids == ("18",)


def test_slurm_is_asked_once_for_all_runs_and_once_more_for_what_it_left_out(
    run: RunFolder, slurm_says: SlurmSays, tmp_path: Path
):
    called = tmp_path / "slurm-stand-ins/squeue.called"
    slurm_says("squeue", squeue_text("7 RUNNING"))
    view_runs([run] * 5)
    assert called.read_text().count("\n") == 1
    append_records(run, [record_of_job("eval", str(job), tmp_path / "jobs/2-eval") for job in range(100, 200)])
    view_runs([run])
    assert called.read_text().count("\n") == 3 and "-j 100,101," in called.read_text().splitlines()[2]


def test_one_unreadable_run_does_not_hide_the_others(run: RunFolder, slurm_says: SlurmSays):
    slurm_says("squeue", squeue_text("7 RUNNING"))
    other = RunFolder(run.root.with_name("output-b")).create()
    other.status.write_text("{")
    assert [view.state for view in view_runs([other, run])] == ["status.json cannot be read", "RUNNING"]


def test_a_second_training_that_failed_does_not_hide_the_first(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    append_records(run, [record_of_job("train", "17", tmp_path / "jobs/7")])
    write_status(run, TRAINING)
    slurm_says("squeue", squeue_text("7 RUNNING", "17 FAILED NonZeroExitCode 5:0"))
    assert state(run) == "training, RUNNING"
