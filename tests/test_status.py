"""`bbu.status`, and what one does to a run: run folders as a trainer leaves them, and Slurm's own words about jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bbu.errors import BBUError, CheckpointError, JobError
from bbu.jobs.control import cancel_runs, log_files, resumption
from bbu.jobs.launch import Submission
from bbu.jobs.records import newest, record_of, remember, remembered
from bbu.jobs.run_status import views_of
from bbu.jobs.schedule import Schedule
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, write_status
from bbu.status import main
from tests.conftest import SlurmSays

TRAINING = RunStatus(
    phase="training", step=30, max_steps=120, seconds_left=3725.0, loss=0.51234, samples_per_second=8.25, pid=4711,
    host="here", stale_after_s=60.0, job={"SLURM_JOB_ID": "7"},
)  # fmt: skip

NAMES = {"8": "bbu-eval", "20": "bbu-compare"}
"""Of jobs that do not train."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was submitted as job 7, in the current folder."""
    monkeypatch.chdir(tmp_path)
    made = RunFolder(tmp_path / "output-a").create()
    made.config.write_text(yaml.safe_dump({"seed": 1, "llm_lr": 1e-5, "run_name": "a"}))
    remember(made, [submitted("train", "7", tmp_path / "jobs/1-train")])
    return made


def submitted(name: str, job: str, folder: Path, element: int | None = None, runs: Sequence[str] = ()):
    folder.mkdir(parents=True, exist_ok=True)
    done = Submission(name, (job,), (folder,), None)
    return record_of(done, "test", ("train", "--nodes", "2", "--config", "smoke"), element, runs)


def squeue(*lines: str) -> str:
    """`7 RUNNING`, `7_1 PENDING Priority`, `7 FAILED NonZeroExitCode 6:0`, each with one restart."""
    told = []
    for words in (line.split() for line in lines):
        job, status, reason, code = words + ["", "", "None", "0:0"][len(words) :]
        array, _, element = job.partition("_")
        name = NAMES.get(array, "bbu-train")
        told.append(f"{array}|{element or 'N/A'}|{status}|{reason}|1|{code}|{name}|{array}|\n")
    return "".join(told)


def state(run: RunFolder) -> str:
    return views_of([run])[0].state


def test_before_its_first_step_a_run_is_what_its_job_is(run: RunFolder, slurm_says: SlurmSays):
    slurm_says("squeue", squeue("7 PENDING Priority"))
    assert state(run) == "PENDING (Priority)"


def test_a_training_run_is_told_with_its_pace(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str]
):
    write_status(run, TRAINING)
    slurm_says("squeue", squeue("7 RUNNING"))
    assert main([]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["a", "training,", "RUNNING", "30/120", "0.5123", "8.25", "1:02:05", "0:00:00", "ago", "-",
                            "-", "1", "-"]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "job", "told"),
    [
        ("completed", "7 COMPLETED", "completed"),
        ("completed", "7 PREEMPTED", "completed"),
        ("preempted", "7 PENDING BeginTime", "preempted, PENDING (BeginTime)"),
        ("failed", "7 FAILED NonZeroExitCode 6:0", "failed, FAILED, exit code 6"),
        ("training", "7 NODE_FAIL", "training, NODE_FAIL"),
        ("training", "7 CANCELLED", "training, CANCELLED"),
    ],
)
def test_the_trainers_word_and_slurms_make_the_state(
    run: RunFolder, slurm_says: SlurmSays, phase: str, job: str, told: str
):
    write_status(run, replace(TRAINING, phase=phase))
    slurm_says("squeue", squeue(job))
    assert state(run) == told


def test_a_silent_trainer_is_stale_and_lost_when_slurm_has_no_job(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, TRAINING)
    slurm_says("squeue", squeue("7 RUNNING"))
    assert not views_of([run])[0].is_stale
    long_ago = time.time() - 600
    os.utime(run.status, (long_ago, long_ago))
    assert views_of([run])[0].is_stale
    slurm_says("squeue", "")
    assert state(run) == "lost: no job, no heartbeat"


def test_a_completed_run_is_never_stale(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, phase="completed"))
    os.utime(run.status, (0, 0))
    slurm_says("squeue", "")
    assert not views_of([run])[0].is_stale and state(run) == "completed"


def test_of_an_array_that_several_runs_share_each_has_its_own_element(run: RunFolder, slurm_says: SlurmSays):
    other = RunFolder(run.root.with_name("output-b")).create()
    for each, element in ((run, 0), (other, 1)):
        remember(each, [submitted("train", "9", run.root.with_name("jobs") / "2", element)])
    slurm_says("squeue", squeue("9_0 RUNNING", "9_1 PENDING Resources", "7 COMPLETED"))
    assert [view.state for view in views_of([run, other])] == ["RUNNING", "PENDING (Resources)"]


def test_a_run_of_an_sbatch_template_is_found_by_what_its_trainer_says(tmp_path: Path, slurm_says: SlurmSays):
    bare = RunFolder(tmp_path / "output-b").create()
    bare.config.write_text("{}")
    write_status(bare, replace(TRAINING, job={"SLURM_JOB_ID": "18"}))
    slurm_says("squeue", squeue("18 RUNNING"))
    [view] = views_of([bare])
    assert view.state == "training, RUNNING" and view.jobs[0].ids == ("18",)


def test_slurm_is_asked_once_for_all_runs_and_once_more_for_what_it_left_out(
    run: RunFolder, slurm_says: SlurmSays, tmp_path: Path
):
    called = tmp_path / "slurm-stand-ins/squeue.called"
    slurm_says("squeue", squeue("7 RUNNING"))
    views_of([run] * 5)
    assert called.read_text().count("\n") == 1
    remember(run, [submitted("eval", str(job), tmp_path / "jobs/2-eval") for job in range(100, 200)])
    views_of([run])
    assert called.read_text().count("\n") == 3 and "-j 100,101," in called.read_text().splitlines()[2]


def test_scores_checkpoints_and_jobs_are_there_for_a_script(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str]
):
    slurm_says("squeue", squeue("7 RUNNING"))
    score(run, 20, "answer", 0.4)
    score(run, 30, "answer", 0.3)
    run.checkpoint(30).mkdir()  # without a manifest: no sound one
    main(["output-a", "--json"])
    [told] = json.loads(capsys.readouterr().out)
    assert told["scores"] == [{"step": 30, "source": "answer", "precision": 0.5, "recall": 0.5, "f1": 0.3}]
    assert told["checkpoint"] is None and told["jobs"][0]["elements"][0]["state"] == "RUNNING"


def score(run: RunFolder, step: int, source: str, f1: float) -> None:
    folder = run.eval / f"checkpoint-{step}" / f"{source}-abc"
    folder.mkdir(parents=True)
    headline = {"precision": 0.5, "recall": 0.5, "f1": f1, "iou": 0.5}
    (folder / "metrics.json").write_text(json.dumps({"step": step, "headline": headline}))


def test_compared_runs_show_where_they_differ_and_their_best_the_winner_first(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    slurm_says("squeue", "")
    other = RunFolder(tmp_path / "output-b").create()
    other.config.write_text(yaml.safe_dump({"seed": 1, "llm_lr": 2e-5, "run_name": "b"}))
    score(run, 10, "answer", 0.2)
    score(other, 10, "answer", 0.9)
    score(other, 20, "answer", 0.4)
    main(["--compare", "--out", "sub/table.md"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "llm_lr", "state", "step", "loss", "best", "F1"]
    assert lines[2].startswith("b") and "2e-05" in lines[2] and "answer 0.900 (step 10)" in lines[2]
    assert (tmp_path / "sub/table.md").read_text().startswith("| run")


def test_where_there_is_no_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no output-"):
        main([])
    with pytest.raises(CheckpointError, match="not a run folder"):
        main(["."])


def test_records_come_back_as_they_were(run: RunFolder):
    [record] = remembered(run)
    assert (record.name, record.ids, record.argv[0], record.cwd) == ("train", ("7",), "train", str(Path.cwd()))
    assert newest(run, "train") == record
    with pytest.raises(JobError, match="no eval job was submitted"):
        newest(run, "eval")


def test_a_run_is_resumed_by_its_own_command_unless_it_is_done_or_busy(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, phase="preempted"))
    slurm_says("squeue", squeue("7 FAILED NonZeroExitCode 75:0"))
    settings = ("--config", str(run.config))  # those it began with, whatever the named file says by now
    assert resumption(run).argv == ("train", "--nodes", "2", *settings)
    slurm_says("squeue", squeue("7 RUNNING"))
    with pytest.raises(JobError, match="job 7 is RUNNING"):
        resumption(run)
    write_status(run, replace(TRAINING, phase="completed"))
    with pytest.raises(JobError, match="completed"):
        resumption(run)


def test_cancel_ends_what_lives_and_nothing_else(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    remember(run, [submitted("eval", "8", tmp_path / "jobs/2-eval")])
    slurm_says("squeue", squeue("7 COMPLETED", "8 PENDING Dependency", "9 RUNNING"))
    slurm_says("scancel", "")
    assert cancel_runs([run])[run] == ["bbu-eval 8: cancelled (was PENDING)"]
    assert (tmp_path / "slurm-stand-ins/scancel.called").read_text() == "8\n"


def test_what_serves_several_runs_ends_when_all_of_them_are_cancelled(
    run: RunFolder, slurm_says: SlurmSays, tmp_path: Path
):
    other = RunFolder(tmp_path / "output-b").create()
    for each in (run, other):
        remember(each, [submitted("compare", "20", tmp_path / "jobs/5", runs=[str(run.root), str(other.root)])])
    slurm_says("squeue", squeue("20 PENDING Dependency", "7 COMPLETED"))
    slurm_says("scancel", "")
    called = tmp_path / "slurm-stand-ins/scancel.called"
    assert cancel_runs([run])[run] == ["compare 20: left, it serves 2 runs; name them all to end it"]
    assert not called.exists()
    assert cancel_runs([run, other])[run] == ["bbu-compare 20: cancelled (was PENDING)"]
    assert called.read_text().startswith("20\n")


def test_an_id_that_came_again_for_another_job_is_left_alone(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    remember(run, [submitted("train", "8", tmp_path / "jobs/6")])  # a bbu-eval by now
    slurm_says("squeue", squeue("8 RUNNING"))
    assert cancel_runs([run])[run] == []


def test_a_run_that_trains_here_is_told_of_and_not_touched(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, replace(TRAINING, job={}))
    slurm_says("squeue", "")
    [told] = cancel_runs([run])[run]
    assert "process 4711 on here" in told


def test_when_slurm_does_not_answer_nothing_is_taken_for_gone(run: RunFolder, slurm_says: SlurmSays):
    write_status(run, TRAINING)
    slurm_says("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
    assert state(run) == "training, Slurm does not answer"
    for ask in (lambda: cancel_runs([run]), lambda: resumption(run)):
        with pytest.raises(JobError, match="does not answer"):
            ask()


def test_one_unreadable_run_does_not_hide_the_others(run: RunFolder, slurm_says: SlurmSays):
    slurm_says("squeue", squeue("7 RUNNING"))
    other = RunFolder(run.root.with_name("output-b")).create()
    other.status.write_text("{")
    assert [view.state for view in views_of([other, run])] == ["status.json cannot be read", "RUNNING"]


def test_a_second_training_that_failed_does_not_hide_the_first(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    remember(run, [submitted("train", "17", tmp_path / "jobs/7")])
    write_status(run, TRAINING)
    slurm_says("squeue", squeue("7 RUNNING", "17 FAILED NonZeroExitCode 5:0"))
    assert state(run) == "training, RUNNING"


def test_cancel_leaves_a_schedule_to_the_other_runs_it_serves(run: RunFolder, slurm_says: SlurmSays, tmp_path: Path):
    slurm_says("squeue", squeue("7 COMPLETED"))
    folder = tmp_path / "jobs/3-eval-schedule"
    folder.mkdir(parents=True)
    (folder / "runs").write_text(f"{run.root}\n{tmp_path}/output-b\n")
    schedule = Schedule("resubmit", 30, folder)
    done = Submission("eval-schedule", (), (folder,), None)
    remember(run, [record_of(done, "test", schedule.argv)])
    assert cancel_runs([run])[run] == ["evals every 30 minutes: no more"]
    assert schedule.runs() == [f"{tmp_path}/output-b"] and not schedule.ended()
    assert views_of([run])[0].evals == "ended"


def test_logs_are_those_of_the_newest_job_that_printed_something(run: RunFolder, tmp_path: Path):
    remember(run, [submitted("eval", "8", tmp_path / "jobs/2-eval")])
    train = tmp_path / "jobs/1-train"
    for rank in (0, 1):
        (train / f"7_{rank}_log.out").touch()
    assert log_files(run, None, "0") == [str(train / "7_0_log.out")]
    assert log_files(run, "train", "all") == [str(train / f"7_{rank}_log.out") for rank in (0, 1)]
    assert log_files(run, "eval", "0") == []
    (tmp_path / "jobs/2-eval/8_0_log.out").touch()
    assert log_files(run, None, "0") == [str(tmp_path / "jobs/2-eval/8_0_log.out")]


def test_logs_of_a_shared_array_are_the_runs_own(run: RunFolder, tmp_path: Path):
    remember(run, [submitted("train", "9", tmp_path / "jobs/4-train", element=10)])
    for element in (1, 10):
        (tmp_path / f"jobs/4-train/9_{element}_0_log.out").touch()
    assert log_files(run, "train", "0") == [str(tmp_path / "jobs/4-train/9_10_0_log.out")]


def test_an_error_of_an_entry_is_one_of_ours(tmp_path: Path):
    with pytest.raises(BBUError):
        log_files(RunFolder(tmp_path), "train", "0")
