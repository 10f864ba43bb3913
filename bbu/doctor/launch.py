"""Runs `bbu.doctor.probe` on compute nodes, or as processes of this machine, and brings its reports back.

Nothing here waits without a bound, and nothing stays behind: a job that is given up on is cancelled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from bbu.doctor.findings import Finding, failure
from bbu.doctor.probe import SIGNAL, Plan, report_path
from bbu.errors import PREEMPTED_EXIT_CODE
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import new_folder, task_command, task_environment
from bbu.jobs.queue import call, leave_job
from bbu.jobs.slurm import sbatch_options

LOG = "tasks.log"
JOB_MINUTES = 10
RUN_S = 300
"""A started job takes half a minute; one that takes this long hangs."""
PATIENCE_S = 60.0
MEGABYTES = 64
POLL_S, QUEUE_POLL_S, END_S = 0.1, 2.0, 30

Report = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of the probe: the tasks' reports, the exit code (None: it had to be ended), what they printed.

    nodes is empty where no job began; `problem` says why it was ended from here.
    """

    tasks: int
    reports: dict[int, Report]
    code: int | None
    log: str
    nodes: str
    waited_s: float
    problem: Finding | None


class Launch(Protocol):
    """A way to run the tasks: under Slurm, or here."""

    def start(self, log: IO[bytes]) -> None: ...

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        ...

    def state(self) -> tuple[str, str, str]:
        """Slurm's state of the job, the reason why it waits, and its nodes."""
        ...

    def send_signal(self, reports: Mapping[int, Report]) -> None: ...

    def stop(self) -> None: ...


class SlurmStep:
    """One srun, which makes a job of its own for its one step."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], name: str) -> None:
        self.argv, self.environment, self.name = argv, environment, name

    def start(self, log: IO[bytes]) -> None:
        """In a session of its own: Ctrl-C is for us, who cancel the job."""
        self.process = subprocess.Popen(
            self.argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def poll(self) -> int | None:
        return self.process.poll()

    def state(self) -> tuple[str, str, str]:
        told = call(["squeue", "-h", "--name", self.name, "-o", "%T|%r|%N"])[1].strip().splitlines()
        state, reason, nodes = (*told[0].split("|"), "", "")[:3] if told else ("", "", "")
        return state, reason, nodes

    def send_signal(self, reports: Mapping[int, Report]) -> None:
        job = next(iter(reports.values()))
        call(["scancel", "--signal=USR2", f"{job['job']}.{job['step']}"])

    def stop(self) -> None:
        call(["scancel", "--name", self.name])
        self.process.terminate()
        try:
            self.process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


class LocalTasks:
    """The same tasks as processes of this machine, told apart as submitit's local executor does."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], tasks: int) -> None:
        self.argv, self.environment, self.tasks = argv, environment, tasks
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, log: IO[bytes]) -> None:
        """Each in a process group of its own, which gets the signals, as ContainerTask has it."""
        for rank in range(self.tasks):
            names = {"GLOBALID": rank, "LOCALID": rank, "NTASKS": self.tasks, "JOB_ID": os.getpid()}
            own = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in names.items()}
            environment = {**self.environment, **own}
            self.processes.append(
                subprocess.Popen(
                    self.argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
                )
            )

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        bad = [code for code in codes if code not in (None, 0, PREEMPTED_EXIT_CODE)]
        if bad:
            self.stop()
            return bad[0]
        return None if None in codes else max(code or 0 for code in codes)

    def state(self) -> tuple[str, str, str]:
        return "RUNNING", "", os.uname().nodename

    def send_signal(self, reports: Mapping[int, Report]) -> None:
        self.kill(signal.SIGUSR2)

    def stop(self) -> None:
        self.kill(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def kill(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)


def plan_of(profile: ClusterProfile) -> Plan:
    return Plan(
        token=secrets.token_hex(8),
        gpus=profile.train.gpus_per_node,
        network_interface=profile.network_interface,
        binds=profile.binds if profile.image else [],
        megabytes=MEGABYTES,
        patience_s=PATIENCE_S,
    )


def prepare(profile: ClusterProfile) -> tuple[Path, Plan]:
    """The folder that the tasks share, with their plan in it."""
    folder, plan = new_folder("doctor", profile), plan_of(profile)
    plan.write(folder)
    return folder, plan


def slurm_step(profile: ClusterProfile, home: Path, nodes: int, folder: Path) -> SlurmStep:
    """A step like a training job's, except for its length."""
    short = dataclasses.replace(profile.train, time_minutes=min(JOB_MINUTES, profile.train.time_minutes), nice=0)
    name = f"bbu-{folder.name}"
    size = [f"--nodes={nodes}", f"--ntasks-per-node={short.tasks_per_node}", f"--job-name={name}"]
    manner = ["--kill-on-bad-exit=1", "--label", "--unbuffered"]
    argv = ["srun", *size, *manner, *sbatch_options(short, profile.gpu_request), *probe_command(profile, home, folder)]
    return SlurmStep(argv, probe_environment(profile, home, folder, os.environ), name)


def local_tasks(profile: ClusterProfile, home: Path, folder: Path) -> LocalTasks:
    """Two of them, or one for each GPU."""
    environment = probe_environment(profile, home, folder, os.environ)
    return LocalTasks(probe_command(profile, home, folder), environment, max(2, profile.train.gpus_per_node))


def probe_command(profile: ClusterProfile, home: Path, folder: Path) -> list[str]:
    inner = list(task_command(home, profile.image, ("-m", "bbu.doctor", "--probe", str(folder))))
    if not profile.modules:
        return inner
    loads = " && ".join(f"module load {module}" for module in profile.modules)
    return ["bash", "-c", f'{loads} && exec "$@"', "bash", *inner]


def probe_environment(profile: ClusterProfile, home: Path, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """A job's own environment, with the probe's folder bound into the image wherever it lies.

    Without the variables of a job around us: srun would become a step of that one.
    """
    outside = dict(environ)
    leave_job(outside)
    ours = task_environment(profile, home, profile.train.gpus_per_node)
    binds = ",".join(filter(None, [ours["BBU_BINDS"], str(folder)]))
    return outside | ours | {"BBU_BINDS": binds, "BBU_REQUEUE": "no"}


def run(
    launch: Launch, folder: Path, tasks: int, wait_minutes: float, tell: Callable[[str], None], run_s: float = RUN_S
) -> Outcome:
    """Run the tasks, send them the stop signal when all are ready, and collect what they found."""
    log = folder / LOG
    with log.open("wb") as file:
        launch.start(file)
    watch = Watch(launch, folder, tasks, tell)
    try:
        problem = watch.follow(wait_minutes * 60, run_s)
    finally:  # also for Ctrl-C
        if launch.poll() is None:
            launch.stop()
    code = launch.poll() if problem is None else None
    told = log.read_text(errors="replace")
    return Outcome(tasks, read_reports(folder, tasks), code, told, watch.nodes, watch.waited, problem)


class Watch:
    """Waits for a launch, first in the queue and then while it runs."""

    def __init__(self, launch: Launch, folder: Path, tasks: int, tell: Callable[[str], None]) -> None:
        self.launch, self.folder, self.tasks, self.tell = launch, folder, tasks, tell
        self.nodes, self.reason, self.waited = "", "", 0.0

    def follow(self, wait_s: float, run_s: float) -> Finding | None:
        """Returns when it has ended, or with the reason to end it."""
        return self.until_running(wait_s) or self.until_ended(run_s)

    def until_running(self, wait_s: float) -> Finding | None:
        start = time.monotonic()
        while self.launch.poll() is None:
            state, reason, self.nodes = self.launch.state()
            self.waited = time.monotonic() - start
            if state == "RUNNING" or read_reports(self.folder, self.tasks):
                return None
            if reason != self.reason and state:
                self.tell(f"the job waits in the queue: {state} ({reason})")
                self.reason = reason
            if self.waited > wait_s:
                return waited_too_long(state or "not there yet", reason, wait_s)
            time.sleep(min(QUEUE_POLL_S, 0.2 + self.waited / 4))
        return None

    def until_ended(self, run_s: float) -> Finding | None:
        deadline, signalled = time.monotonic() + run_s, False
        while self.launch.poll() is None:
            reports = read_reports(self.folder, self.tasks)
            if not signalled and len(reports) == self.tasks and all(r["stage"] == SIGNAL for r in reports.values()):
                self.launch.send_signal(reports)
                signalled = True
            if time.monotonic() > deadline:
                return failure(
                    f"the job ran for {run_s:.0f} s without an end and was cancelled",
                    "see below how far each task got",
                )
            time.sleep(POLL_S)
        return None


def waited_too_long(state: str, reason: str, wait_s: float) -> Finding:
    reasons = {
        "Resources": "the nodes are busy: try again later, with --wait MINUTES, or with fewer --nodes",
        "Priority": "others are before you: try again later, or with --wait MINUTES",
        "QOS|Assoc": "a limit of your account or QOS holds it back: sacctmgr show qos, or ask the administrators",
        "Down|Drain|Unavail|ReqNode": "nodes are out of service: sinfo -R tells why; use others or fewer",
        "Partition": "the partition does not allow this: see its limits by scontrol show partition",
    }
    remedy = next((text for pattern, text in reasons.items() if re.search(pattern, reason)), reasons["Resources"])
    told = f"{state}, reason {reason}" if reason else state
    return failure(f"the job did not start within {wait_s / 60:g} minutes and was cancelled ({told})", remedy)


def read_reports(folder: Path, tasks: int) -> dict[int, Report]:
    """By rank. A report is replaced whole, so one that is there can be read."""
    paths = {rank: report_path(folder, rank) for rank in range(tasks)}
    return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}
