"""Runs `bbu.doctor.probe` on compute nodes, or as processes of this machine, and collects its reports.

Every wait has a limit, and nothing stays behind: a job that does not end is cancelled.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from bbu.doctor.findings import Finding, failure
from bbu.doctor.report import SIGNAL, Plan, TaskReport, read_reports
from bbu.errors import PREEMPTED_EXIT_CODE, JobError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import new_folder, task_command, task_environment
from bbu.jobs.queue import clear_job_environment, expand_nodes, run_slurm_command
from bbu.jobs.slurm import sbatch_options
from bbu.jobs.spec import job_name

LOG = "tasks.log"
"""What all tasks print, in the folder that they share."""
_JOB_MINUTES = 10
"""Slurm's time limit for the job."""
_RUN_S = 300
"""A job that started takes half a minute; one that takes this long hangs."""
_PATIENCE_S = 60.0
"""Longest wait of a task for the others."""
_MEGABYTES = 64
"""Size of the tensor that is summed: large enough for bandwidth to outweigh latency."""
_POLL_S, _QUEUE_POLL_S = 0.1, 2.0
_END_S = 30
"""How long srun may take to end after its job was cancelled, before it is killed."""


@dataclass(frozen=True)
class JobState:
    """How the job stands in Slurm's queue."""

    state: str
    """Slurm's word, such as PENDING; empty where Slurm does not list the job."""
    reason: str
    """Why it waits."""
    nodes: tuple[str, ...]
    """Names of its nodes, in the order of its tasks; empty before it starts."""


@dataclass(frozen=True)
class Outcome:
    """What came of the job."""

    tasks: int
    """Number of tasks that were to run."""
    reports: dict[int, TaskReport]
    """The tasks' reports, by rank."""
    code: int | None
    """Exit code of the job; None where it had to be ended from here."""
    log: str
    """What all tasks printed."""
    nodes: tuple[str, ...]
    """Names of the nodes, in the order of the tasks; empty where the job never started."""
    waited_s: float
    """Time in the queue, in seconds."""
    problem: Finding | None
    """Why the job was ended from here."""


class Launch(Protocol):
    """A way to run the tasks: under Slurm, or here."""

    def start(self, log: IO[bytes]) -> None:
        """Start all tasks; what they print goes to `log`."""
        ...

    def poll(self) -> int | None:
        """Return the exit code, or None while a task runs."""
        ...

    def query_state(self) -> JobState:
        """Return how the job stands."""
        ...

    def send_signal(self, reports: Mapping[int, TaskReport]) -> None:
        """Send USR2 to all tasks."""
        ...

    def stop(self) -> None:
        """End all tasks."""
        ...


class SlurmStep:
    """One srun, which makes a job of its own for its one step."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], name: str) -> None:
        self.argv, self.environment, self.name = argv, environment, name

    def start(self, log: IO[bytes]) -> None:
        """Start srun in a session of its own: Ctrl-C is for this process, which then cancels the job."""
        self._process = subprocess.Popen(
            self.argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def poll(self) -> int | None:
        """Return srun's exit code, or None while it runs."""
        return self._process.poll()

    def query_state(self) -> JobState:
        """Ask squeue for the job by its name, which no other job has."""
        lines = run_slurm_command(["squeue", "-h", "--name", self.name, "-o", "%T|%r|%N"])[1].strip().splitlines()
        if not lines:
            return JobState("", "", ())
        state, reason, node_list = (*lines[0].split("|"), "", "")[:3]
        return JobState(state, reason, _host_names(node_list))

    def send_signal(self, reports: Mapping[int, TaskReport]) -> None:
        """Signal the step, whose id the tasks report."""
        node = next(iter(reports.values())).node
        run_slurm_command(["scancel", "--signal=USR2", f"{node.job_id}.{node.step_id}"])

    def stop(self) -> None:
        """Cancel the job and end srun."""
        run_slurm_command(["scancel", "--name", self.name])
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _host_names(node_list: str) -> tuple[str, ...]:
    """Names of a node list; none where the job has no nodes yet, or where scontrol does not answer."""
    try:
        return tuple(expand_nodes(node_list))
    except JobError:
        return ()


class LocalTasks:
    """The same tasks as processes of this machine, numbered as submitit's local executor numbers them."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], tasks: int) -> None:
        self.argv, self.environment, self.tasks = argv, environment, tasks
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, log: IO[bytes]) -> None:
        """Start each task in a process group of its own, which gets the signals, as a local job's tasks have it."""
        for rank in range(self.tasks):
            variables = {"GLOBALID": rank, "LOCALID": rank, "NTASKS": self.tasks, "JOB_ID": os.getpid()}
            numbered = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in variables.items()}
            environment = {**self.environment, **numbered}
            self._processes.append(
                subprocess.Popen(
                    self.argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
                )
            )

    def poll(self) -> int | None:
        """Return the highest exit code; the first task that fails ends the others, as srun does it."""
        codes = [process.poll() for process in self._processes]
        failed = [code for code in codes if code not in (None, 0, PREEMPTED_EXIT_CODE)]
        if failed:
            self.stop()
            return failed[0]
        return None if None in codes else max(code or 0 for code in codes)

    def query_state(self) -> JobState:
        """Processes of this machine do not wait in a queue."""
        return JobState("RUNNING", "", (os.uname().nodename,))

    def send_signal(self, reports: Mapping[int, TaskReport]) -> None:
        """Signal every task's process group."""
        self._signal_groups(signal.SIGUSR2)

    def stop(self) -> None:
        """Kill every task's process group."""
        self._signal_groups(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _signal_groups(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, number)


def prepare_folder(profile: ClusterProfile) -> tuple[Path, Plan]:
    """Make the folder that the tasks share, and write their plan into it."""
    folder = new_folder("doctor", profile)
    plan = Plan(
        token=secrets.token_hex(8),
        gpus=profile.train.gpus_per_node,
        network_interface=profile.network_interface,
        binds=profile.binds if profile.image else [],
        megabytes=_MEGABYTES,
        patience_s=_PATIENCE_S,
    )
    plan.write(folder)
    return folder, plan


def slurm_step(profile: ClusterProfile, checkout: Path, nodes: int, folder: Path) -> SlurmStep:
    """Return a step like a training job's, except for its time limit."""
    resources = dataclasses.replace(profile.train, time_minutes=min(_JOB_MINUTES, profile.train.time_minutes), nice=0)
    name = job_name(folder.name)
    size = [f"--nodes={nodes}", f"--ntasks-per-node={resources.tasks_per_node}", f"--job-name={name}"]
    manner = ["--kill-on-bad-exit=1", "--label", "--unbuffered"]
    options = sbatch_options(resources, profile.gpu_request)
    argv = ["srun", *size, *manner, *options, *_probe_command(profile, checkout, folder)]
    return SlurmStep(argv, _probe_environment(profile, checkout, folder, os.environ), name)


def local_tasks(profile: ClusterProfile, checkout: Path, folder: Path) -> LocalTasks:
    """Return two tasks for this machine, or one for each GPU."""
    environment = _probe_environment(profile, checkout, folder, os.environ)
    return LocalTasks(_probe_command(profile, checkout, folder), environment, max(2, profile.train.gpus_per_node))


def _probe_command(profile: ClusterProfile, checkout: Path, folder: Path) -> list[str]:
    inner = list(task_command(checkout, profile.image, ("-m", "bbu.doctor", "--probe", str(folder))))
    if not profile.modules:
        return inner
    loads = " && ".join(f"module load {module}" for module in profile.modules)
    return ["bash", "-c", f'{loads} && exec "$@"', "bash", *inner]


def _probe_environment(
    profile: ClusterProfile, checkout: Path, folder: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """A job's own environment, with the tasks' folder bound into the image wherever it lies.

    The variables of a surrounding job are left out: with them srun would become a step of that job. The job is never
    requeued: its exit code 75 must come back here.
    """
    outside = dict(environ)
    clear_job_environment(outside)
    environment = task_environment(profile, checkout, profile.train.gpus_per_node)
    binds = ",".join(filter(None, [environment["BBU_BINDS"], str(folder)]))
    return outside | environment | {"BBU_BINDS": binds, "BBU_REQUEUE": "no"}


def run_tasks(
    launch: Launch,
    folder: Path,
    tasks: int,
    wait_minutes: float,
    notify: Callable[[str], None],
    run_s: float = _RUN_S,
) -> Outcome:
    """Run the tasks, send them the stop signal when all are ready for it, and collect their reports.

    Args:
        launch: the way to run them.
        folder: the folder that they share.
        tasks: their number.
        wait_minutes: longest wait in the queue, in minutes.
        notify: called with a line for the person at the terminal.
        run_s: longest time from the start to the end of the job, in seconds.
    """
    log = folder / LOG
    with log.open("wb") as file:
        launch.start(file)
    watch = _Watch(launch, folder, tasks, notify)
    try:
        problem = watch.follow(wait_minutes * 60, run_s)
    finally:  # also for Ctrl-C
        if launch.poll() is None:
            launch.stop()
    return Outcome(
        tasks=tasks,
        reports=read_reports(folder, tasks),
        code=launch.poll() if problem is None else None,
        log=log.read_text(errors="replace"),
        nodes=watch.nodes,
        waited_s=watch.waited_s,
        problem=problem,
    )


class _Watch:
    """Waits for a launch, first in the queue and then while it runs."""

    def __init__(self, launch: Launch, folder: Path, tasks: int, notify: Callable[[str], None]) -> None:
        self.launch, self.folder, self.tasks, self.notify = launch, folder, tasks, notify
        self.nodes: tuple[str, ...] = ()
        self.reason, self.waited_s = "", 0.0

    def follow(self, wait_s: float, run_s: float) -> Finding | None:
        """Return when the launch has ended, or with the reason to end it."""
        return self._until_running(wait_s) or self._until_ended(run_s)

    def _until_running(self, wait_s: float) -> Finding | None:
        start = time.monotonic()
        while self.launch.poll() is None:
            job = self.launch.query_state()
            self.nodes, self.waited_s = job.nodes, time.monotonic() - start
            if job.state == "RUNNING" or read_reports(self.folder, self.tasks):
                return None
            if job.reason != self.reason and job.state:
                self.notify(f"the job waits in the queue: {job.state} ({job.reason})")
                self.reason = job.reason
            if self.waited_s > wait_s:
                return _waited_too_long(job.state or "not there yet", job.reason, wait_s)
            time.sleep(min(_QUEUE_POLL_S, 0.2 + self.waited_s / 4))  # often at first: most jobs start at once
        return None

    def _until_ended(self, run_s: float) -> Finding | None:
        deadline, signalled = time.monotonic() + run_s, False
        while self.launch.poll() is None:
            reports = read_reports(self.folder, self.tasks)
            ready = len(reports) == self.tasks and all(report.stage == SIGNAL for report in reports.values())
            if ready and not signalled:
                self.launch.send_signal(reports)
                signalled = True
            if time.monotonic() > deadline:
                what = f"the job ran for {run_s:.0f} s without an end and was cancelled"
                return failure(what, "see below how far each task got")
            time.sleep(_POLL_S)
        return None


def _waited_too_long(state: str, reason: str, wait_s: float) -> Finding:
    reasons = {
        "Resources": "the nodes are busy: try again later, with --wait MINUTES, or with fewer --nodes",
        "Priority": "others are before you: try again later, or with --wait MINUTES",
        "QOS|Assoc": "a limit of your account or QOS holds it back: sacctmgr show qos, or ask the administrators",
        "Down|Drain|Unavail|ReqNode": "nodes are out of service: sinfo -R tells why; use others or fewer",
        "Partition": "the partition does not allow this: see its limits by scontrol show partition",
    }
    remedy = next((text for pattern, text in reasons.items() if re.search(pattern, reason)), reasons["Resources"])
    text = f"{state}, reason {reason}" if reason else state
    return failure(f"the job did not start within {wait_s / 60:g} minutes and was cancelled ({text})", remedy)
