"""Whatever ends a job early, it resumes where it stopped: by bbu.submit and by an sbatch template alike.

The program is a stand-in that counts steps (programs/counter.py), so that many endings fit into a minute; the
real trainer meets the commonest of them in test_pipeline.py and test_day.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import testbed
from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Counting:
    """A job that counts: its id, and the file it saves to. An array has several files."""

    user: User
    job: str
    names: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.user.output(self.job)

    @property
    def saved_step(self) -> int:
        """The step in the (first) file."""
        path = self.user.checkout / self.names[0]
        return int(path.read_text()) if path.exists() else 0

    def wait_for(self, text: str, times: int = 1) -> None:
        self.user.wait_for(self.job, text, times)

    def assert_resumed_once(self) -> None:
        """Wait until the job has completed; it must have stopped once."""
        self.user.assert_completed(self.job, timeout=150)
        assert self.count_stops() == 1, self.output

    def count_stops(self) -> int:
        """How often it stopped. Each further start begins at the step that rank 0 saved, and rank 1 ended each start
        itself: it saved too, or was done a moment before the stop signal (the ranks of this program count apart).
        """
        began = [int(step) for step in re.findall(r"^start \d+ at step (\d+)", self.output, re.MULTILINE)]
        saved = [int(step) for step in re.findall(r"^saved step (\d+)", self.output, re.MULTILINE)]
        ends_of_rank_1 = re.findall(r"^rank 1: (?:saved|done)", self.output, re.MULTILINE)
        assert began[: len(saved) + 1] == [0, *saved] and len(ends_of_rank_1) > len(saved), self.output
        assert "\ndone at step" in self.output, self.output
        return len(saved)


@dataclass(frozen=True)
class Starter:
    """Starts counting jobs as one user, in either way."""

    user: User

    def by_submit(
        self,
        partition: str,
        steps: int,
        minutes: int = 30,
        names: tuple[str, ...] = (),
        nodes: int = 2,
        max_requeues: int = 3,
    ) -> Counting:
        names = names or (self.fresh_name("submit"),)
        commands = [["tests/cluster/programs/counter.py", name, str(steps), "0.1"] for name in names]
        resources = {"partition": partition, "time_minutes": minutes}
        job = {"name": "count", "nodes": nodes, "commands": commands, "resources": resources}
        [(job_id, _)] = self.user.submit_specs(job | {"max_requeues": max_requeues})
        return Counting(self.user, job_id, names)

    def by_sbatch(self, partition: str, steps: int, minutes: int = 30, array: bool = False, nodes: int = 2) -> Counting:
        name = self.fresh_name("sbatch")
        target = f"{name}${{SLURM_ARRAY_TASK_ID:-}}"
        count = f'run_tasks python tests/cluster/programs/counter.py "{target}" {steps} 0.1'
        (self.user.checkout / f"{name}.sbatch").write_text(f"#!/bin/bash\n. slurm/job.sh\n{count}\n")
        options = [f"-N{nodes}", f"--partition={partition}", f"--time={minutes}", "--signal=USR2@20", "--requeue",
                   "--open-mode=append", "--ntasks-per-node=1"]  # fmt: skip
        options += ["--array=0-1", f"--output=slurm-{name}-%A_%a.out"] if array else [f"--output=slurm-{name}-%j.out"]
        job = self.user.sbatch(*options, f"{name}.sbatch")
        return Counting(self.user, job, (f"{name}0", f"{name}1") if array else (name,))

    def both(self, partition: str, steps: int, minutes: int = 30) -> list[Counting]:
        """The same job in either way, side by side, both counting."""
        jobs = [self.by_submit(partition, steps, minutes), self.by_sbatch(partition, steps, minutes)]
        for job in jobs:
            wait_until(lambda job=job: job.saved_step >= 10, 60, lambda job=job: job.output)
        return jobs

    def fresh_name(self, name: str) -> str:
        return f"{name}-{time.monotonic_ns()}"


@pytest.fixture(scope="module")
def user(cluster: Cluster) -> User:
    return User(cluster)


@pytest.fixture(scope="module")
def start(user: User) -> Starter:
    return Starter(user)


@pytest.fixture(scope="module", autouse=True)
def out_of_time(start: Starter) -> list[Counting]:
    """Jobs that need 50 seconds and get the stop signal 20 seconds before their minute ends, or up to a minute earlier,
    as Slurm may. They begin first, since the other tests pass meanwhile.
    """
    return [start.by_submit("cpu", 500, minutes=1, max_requeues=20), start.by_sbatch("cpu", 500, minutes=1)]


def test_requeued_by_hand(start: Starter) -> None:
    jobs = start.both("cpu", 40)
    for job in jobs:
        start.user.cluster.run(["scontrol", "requeue", job.job])
    for job in jobs:
        job.assert_resumed_once()


def test_stopped_by_a_signal(start: Starter) -> None:
    jobs = start.both("cpu", 40)
    for job, name in zip(jobs, ("USR1", "TERM"), strict=True):
        start.user.cluster.run(["scancel", f"--signal={name}", job.job])
    for job in jobs:
        job.assert_resumed_once()


def test_a_cancelled_job_saves_and_stays_cancelled(start: Starter) -> None:
    jobs = start.both("cpu", 300)
    for job in jobs:
        start.user.cluster.run(["scancel", job.job])
    for job in jobs:
        assert start.user.cluster.wait(job.job) == "CANCELLED"
        wait_until(lambda job=job: "so it is not requeued" in job.output, 20, lambda job=job: job.output)
        assert "saved step" in job.output
    time.sleep(2)
    assert {start.user.cluster.wait(job.job) for job in jobs} == {"CANCELLED"}


@pytest.mark.parametrize("way", ["submit", "sbatch"])
def test_an_element_that_stops_takes_none_of_its_array_along(start: Starter, way: str) -> None:
    """The element that starts last has the array's own number as its job id."""
    names = tuple(start.fresh_name(f"element{n}") for n in range(2))
    array = start.by_submit("cpu", 60, names=names, nodes=1) if way == "submit" else start.by_sbatch(
        "cpu", 60, array=True, nodes=1)  # fmt: skip
    array.wait_for("start 0", times=2)
    start.user.cluster.run(["scancel", "--signal=USR2", f"{array.job}_1"])
    assert start.user.cluster.wait(array.job, timeout=120) == "COMPLETED", array.output
    text = start.user.cluster.run(["scontrol", "show", "job", "-o", array.job]).stdout
    restarts = {m[0]: m[1] for m in re.findall(r"ArrayTaskId=(\d) .*?Restarts=(\d)", text)}
    assert restarts == {"0": "0", "1": "1"}, text


def test_a_cap_ends_the_row_of_requeues(start: Starter) -> None:
    job = start.by_submit("cpu", 300, nodes=1, max_requeues=0)
    job.wait_for("start 0")
    start.user.cluster.run(["scancel", "--signal=USR2", job.job])
    assert start.user.cluster.wait(job.job) == "FAILED"
    assert "the most allowed" in job.output and "ExitCode=75:0" in start.user.cluster.describe(job.job)


def test_out_of_time(out_of_time: list[Counting]) -> None:
    for job in out_of_time:
        job.user.assert_completed(job.job, timeout=200)
        assert job.count_stops() >= 1
        assert "after SIGUSR2" in job.output


def preempt(start: Starter) -> list[Counting]:
    """Jobs in partitions whose jobs are requeued, or cancelled after GraceTime, when an urgent one wants the nodes."""
    cluster = start.user.cluster
    jobs = [*start.both("requeue", 80), *start.both("cancel", 80)]
    urgent = cluster.sbatch("--partition=urgent", "-N2", "--exclusive", "--wrap", "sleep 1")
    assert cluster.wait(urgent, timeout=90) == "COMPLETED", cluster.describe(urgent)
    return jobs


def test_preempted_with_time_to_save(start: Starter) -> None:
    for job in preempt(start):
        job.assert_resumed_once()


def test_preempted_on_a_newer_slurm_that_sends_the_requested_signal(newer: Cluster) -> None:
    """Until 26.05 Slurm takes the mark of a preemption over into the next start: it calls a job PREEMPTED that ends
    well, or starts it a third time, where the program finds that all is done.
    """
    for job in preempt(Starter(User(newer))):
        wait_until(lambda job=job: "\ndone at step" in job.output, 90, lambda job=job: job.output)
        assert newer.wait(job.job) in ("COMPLETED", "PREEMPTED")
        assert job.count_stops() == 1
        assert "after SIGUSR2" in job.output


@pytest.fixture
def n2_comes_back(cluster: Cluster) -> Iterator[None]:
    yield
    testbed.script("up.sh")


def test_a_node_dies_without_a_word(start: Starter, n2_comes_back: None) -> None:
    jobs = start.both("cpu", 90)
    wait_until(lambda: all(job.saved_step >= 20 for job in jobs), 30, lambda: str([job.saved_step for job in jobs]))
    kill_node("n2")
    take_down("n2", start.user.cluster)
    testbed.script("up.sh")
    for job in jobs:
        start.user.assert_completed(job.job, timeout=120)
        second = re.findall(r"^start 1 at step (\d+)", job.output, re.MULTILINE)
        assert len(second) == 1 and int(second[0]) >= 20, job.output


def take_down(name: str, cluster: Cluster) -> None:
    """What slurmctld does by itself after SlurmdTimeout: two minutes that a test need not wait."""
    environ = os.environ | {"SLURM_CONF": str(cluster.prefix / "state/etc/slurm.conf")}
    line = ["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died"]
    subprocess.run(line, check=True, env=environ)


def kill_node(name: str) -> None:
    """All at once what a power cut ends: its slurmd, the keepers of its steps, and their processes."""
    daemon = [pid for pid in processes() if command(pid)[:3] == ["slurmd", "-N", name]]
    steps = [pid for pid in processes() if f"SLURMD_NODENAME={name}" in environment(pid)]
    keepers = {parent for pid in steps if (parent := keeper(pid))}
    assert daemon and keepers and steps
    for pid in [*daemon, *keepers, *steps]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


def command(pid: int) -> list[str]:
    argv = read(pid, "cmdline").split("\0")
    return [os.path.basename(argv[0]), *argv[1:]]


def environment(pid: int) -> list[str]:
    return read(pid, "environ").split("\0")


def keeper(pid: int) -> int | None:
    """The slurmstepd above a process."""
    while pid > 1 and (stat := read(pid, "stat")):
        if read(pid, "comm").startswith("slurmstepd"):
            return pid
        pid = int(stat.rpartition(")")[2].split()[1])
    return None
