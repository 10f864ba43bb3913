"""What a person does with submitted runs: cancel, resume, look at logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bbu.errors import BBUError, JobError
from bbu.jobs.control import _log_files, cancel_runs, training_to_resume
from bbu.jobs.records import append_records, schedule_record
from bbu.jobs.run_status import view_runs
from bbu.jobs.schedule import Schedule
from bbu.run.folder import RunFolder
from bbu.run.status import write_status
from tests.conftest import SlurmSays
from tests.jobs.runs import TRAINING, record_of_job, squeue_text


def test_a_run_is_resumed_with_its_own_settings_unless_it_is_completed_or_busy(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, phase="stopped"))
    slurm_says("squeue", squeue_text("7 FAILED NonZeroExitCode 75:0"))
    request, folder = training_to_resume(run)
    # the config that it began with, whatever the named file says by now
    command = ("train", "--nodes", "2", "--cluster", "test", "--config", str(run.config))
    assert (request.resume_command(), folder) == (command, Path.cwd())
    slurm_says("squeue", squeue_text("7 RUNNING"))
    with pytest.raises(JobError, match="job 7 is RUNNING"):
        training_to_resume(run)
    write_status(run, replace(TRAINING, phase="completed"))
    with pytest.raises(JobError, match="completed"):
        training_to_resume(run)


def test_cancel_ends_live_jobs_and_nothing_else(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    append_records(run, [record_of_job("eval", "8", tmp_path / "jobs/2-eval")])
    slurm_says("squeue", squeue_text("7 COMPLETED", "8 PENDING Dependency", "9 RUNNING"))
    slurm_says("scancel", "")
    assert cancel_runs([run])[run] == ["bbu-eval 8: cancelled (was PENDING)"]
    assert (tmp_path / "slurm-stand-ins/scancel.called").read_text() == "8\n"


def test_a_job_of_several_runs_ends_when_all_of_them_are_cancelled(
    run: RunFolder, slurm_says: SlurmSays, tmp_path: Path
):
    other = RunFolder(tmp_path / "output-b").create()
    for each in (run, other):
        append_records(
            each, [record_of_job("compare", "20", tmp_path / "jobs/5", runs=[str(run.root), str(other.root)])]
        )
    slurm_says("squeue", squeue_text("20 PENDING Dependency", "7 COMPLETED"))
    slurm_says("scancel", "")
    called = tmp_path / "slurm-stand-ins/scancel.called"
    assert cancel_runs([run])[run] == ["compare 20: left, it serves 2 runs; name them all to end it"]
    assert not called.exists()
    assert cancel_runs([run, other])[run] == ["bbu-compare 20: cancelled (was PENDING)"]
    assert called.read_text().startswith("20\n")


def test_an_id_that_came_again_for_another_job_is_left_alone(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    append_records(run, [record_of_job("train", "8", tmp_path / "jobs/6")])  # a bbu-eval by now
    slurm_says("squeue", squeue_text("8 RUNNING"))
    assert cancel_runs([run])[run] == []


def test_a_run_that_trains_on_this_machine_is_reported_and_not_ended(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, job={}))
    slurm_says("squeue", "")
    [line] = cancel_runs([run])[run]
    assert "process 4711 on here" in line


def test_when_slurm_does_not_answer_nothing_is_taken_for_gone(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, TRAINING)
    slurm_says("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
    assert view_runs([run])[0].state == "training, Slurm does not answer"
    for act in (lambda: cancel_runs([run]), lambda: training_to_resume(run)):
        with pytest.raises(JobError, match="does not answer"):
            act()


def test_cancel_leaves_a_schedule_to_the_other_runs_it_serves(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    slurm_says("squeue", squeue_text("7 COMPLETED"))
    folder = tmp_path / "jobs/3-eval-schedule"
    folder.mkdir(parents=True)
    (folder / "runs").write_text(f"{run.root}\n{tmp_path}/output-b\n")
    schedule = Schedule("resubmit", 30, folder)
    append_records(run, [schedule_record(schedule, "test")])
    assert cancel_runs([run])[run] == ["evals every 30 minutes: cancelled"]
    assert schedule.runs() == [f"{tmp_path}/output-b"] and not schedule.end_reason()
    assert view_runs([run])[0].evals == "ended"


def test_logs_are_those_of_the_newest_job_that_printed_something(run: RunFolder, tmp_path: Path):
    append_records(run, [record_of_job("eval", "8", tmp_path / "jobs/2-eval")])
    train = tmp_path / "jobs/1-train"
    for rank in (0, 1):
        (train / f"7_{rank}_log.out").touch()
    assert _log_files(run, None, "0") == [str(train / "7_0_log.out")]
    assert _log_files(run, "train", "all") == [str(train / f"7_{rank}_log.out") for rank in (0, 1)]
    assert _log_files(run, "eval", "0") == []
    (tmp_path / "jobs/2-eval/8_0_log.out").touch()
    assert _log_files(run, None, "0") == [str(tmp_path / "jobs/2-eval/8_0_log.out")]


def test_logs_of_a_shared_array_are_the_runs_own(run: RunFolder, tmp_path: Path):
    append_records(run, [record_of_job("train", "9", tmp_path / "jobs/4-train", element=10)])
    for element in (1, 10):
        (tmp_path / f"jobs/4-train/9_{element}_0_log.out").touch()
    assert _log_files(run, "train", "0") == [str(tmp_path / "jobs/4-train/9_10_0_log.out")]


def test_logs_of_a_job_that_was_never_submitted_are_refused(tmp_path: Path):
    with pytest.raises(BBUError):
        _log_files(RunFolder(tmp_path), "train", "0")
