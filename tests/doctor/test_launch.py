"""The doctor's job: what it requests, how it is watched, and that it always ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

from bbu.doctor.launch import JobState, SlurmStep, _probe_environment, run_tasks, slurm_step
from bbu.doctor.report import SIGNAL, TaskReport
from bbu.jobs.clusters import ClusterProfile
from tests.conftest import SlurmSays
from tests.doctor.findings import CHECKOUT, lines_of, with_train
from tests.doctor.reports import findings_of, unfinished_report


class ScriptedLaunch:
    """A launch that does what the test says: `query_state` returns each of `steps` in turn, then the last again."""

    def __init__(self, folder: Path, steps: Sequence[JobState], code: int | None = None) -> None:
        self.folder, self.steps, self.code = folder, list(steps), code
        self.signals, self.stopped = 0, False

    def start(self, log: IO[bytes]) -> None:
        log.write(b"srun: hello\n")

    def poll(self) -> int | None:
        return -15 if self.stopped else self.code

    def query_state(self) -> JobState:
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if step.state == "interrupt":
            raise KeyboardInterrupt
        return step

    def send_signal(self, reports: Mapping[int, TaskReport]) -> None:
        self.signals += 1
        self.code = 75

    def stop(self) -> None:
        self.stopped = True


def ignore(text: str) -> None:
    pass


def test_a_job_that_waits_too_long_is_cancelled_and_says_why(tmp_path: Path, profile: ClusterProfile):
    launch = ScriptedLaunch(tmp_path, [JobState("PENDING", "Resources", ())])
    notices: list[str] = []
    result = run_tasks(launch, tmp_path, 2, 0.005, notices.append)
    assert launch.stopped and notices == ["the job waits in the queue: PENDING (Resources)"]
    [what] = lines_of(findings_of(profile, result))
    assert what == "the job did not start within 0.005 minutes and was cancelled (PENDING, reason Resources)"


def test_a_job_that_hangs_is_cancelled(tmp_path: Path):
    launch = ScriptedLaunch(tmp_path, [JobState("RUNNING", "None", ("n1", "n2"))])
    result = run_tasks(launch, tmp_path, 2, 1, ignore, run_s=0.2)
    assert launch.stopped and result.problem and "without an end" in result.problem.what
    assert (result.nodes, result.log) == (("n1", "n2"), "srun: hello\n")


def test_ctrl_c_cancels_the_job(tmp_path: Path):
    launch = ScriptedLaunch(tmp_path, [JobState("PENDING", "Resources", ()), JobState("interrupt", "", ())])
    with pytest.raises(KeyboardInterrupt):
        run_tasks(launch, tmp_path, 2, 1, ignore)
    assert launch.stopped


def test_the_signal_is_sent_once_when_all_tasks_are_ready(tmp_path: Path):
    launch = ScriptedLaunch(tmp_path, [JobState("RUNNING", "None", ("n1",))])
    for rank in (0, 1):
        unfinished_report(rank, "n1", SIGNAL).write(tmp_path)
    result = run_tasks(launch, tmp_path, 2, 1, ignore)
    assert (launch.signals, launch.stopped, result.code, len(result.reports)) == (1, False, 75, 2)


def test_the_step_requests_what_a_training_job_requests(profile: ClusterProfile, tmp_path: Path):
    requesting = with_train(
        dataclasses.replace(profile, modules=["apptainer"]), gpus_per_node=4, account="chem", nice=100
    )
    step = slurm_step(requesting, CHECKOUT, 2, tmp_path)
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--account=chem", "--time=10"):
        assert option in step.argv
    assert "--nice=100" not in step.argv and 'module load apptainer && exec "$@"' in step.argv
    assert step.environment["BBU_BINDS"] == str(tmp_path)


def test_the_variables_of_a_surrounding_job_are_left_out(profile: ClusterProfile, tmp_path: Path):
    environ = {"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    environment = _probe_environment(profile, CHECKOUT, tmp_path, environ)
    assert "SLURM_JOB_ID" not in environment and environment["SLURM_CONF"] == "/etc/slurm.conf"


def test_the_state_of_a_job_holds_the_names_of_its_nodes(slurm_says: SlurmSays):
    slurm_says("squeue", "RUNNING|None|n[1-2]\n")
    slurm_says("scontrol", "n1\nn2\n")
    assert SlurmStep([], {}, "bbu-doctor").query_state() == JobState("RUNNING", "None", ("n1", "n2"))


def test_a_job_that_waits_has_no_nodes(slurm_says: SlurmSays):
    slurm_says("squeue", "PENDING|Resources|\n")
    assert SlurmStep([], {}, "bbu-doctor").query_state() == JobState("PENDING", "Resources", ())
