"""What one task of the doctor's job reports: the plan that it follows, and its findings on its node as plain facts.

Both travel as JSON files in the folder that the tasks share. They live for one run of the doctor only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bbu.errors import JobError
from bbu.run.files import write_atomic
from bbu.strict_json import read_json

Stage = Literal["files", "all-reduce", "signal", "done"]
FILES: Stage = "files"
"""The task tries the shared filesystem."""
ALL_REDUCE: Stage = "all-reduce"
"""The task sums a tensor over all tasks."""
SIGNAL: Stage = "signal"
"""The task waits for the stop signal."""
DONE: Stage = "done"
"""The task received the stop signal and could continue."""

_PLAN = "plan.json"
_ADVICE = "run the doctor again, and look for what else writes there"


@dataclass(frozen=True)
class Plan:
    """What the tasks must know of the profile; the login node writes it into their folder."""

    token: str
    """Random text by which the login node recognises its own folder in a report."""
    gpus: int
    """GPUs per node that the profile requests; 0 for a sum on CPUs."""
    network_interface: str | None
    """The interface that the profile states for NCCL and gloo."""
    binds: list[str]
    """The profile's binds, as Apptainer takes them."""
    megabytes: int
    """Size of the tensor that is summed, in MB."""
    patience_s: float
    """Longest wait for the other tasks, in seconds."""

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read the plan from the folder of the tasks."""
        return cls(**read_json(folder / _PLAN, JobError, _ADVICE))

    def write(self, folder: Path) -> None:
        """Write the plan into the folder of the tasks."""
        write_atomic(folder / _PLAN, json.dumps(asdict(self)))


@dataclass(frozen=True)
class BindFacts:
    """How a bind looks inside the container."""

    bind: str
    """As the profile states it: `/from`, `/from:/to` or `/from:/to:ro`."""
    readable: bool
    """Whether the task may list the folder."""
    writable: bool
    """Whether the task may write into it."""


@dataclass(frozen=True)
class NodeFacts:
    """What a task sees of its node without any other task."""

    name: str
    """The node's name: Slurm's, else the host's."""
    job_id: str | None
    """SLURM_JOB_ID; None without Slurm."""
    step_id: str | None
    """SLURM_STEP_ID; None without Slurm."""
    in_container: bool
    """Whether Python runs inside an image."""
    user_site: bool
    """Whether packages in the home folder come before those of the image."""
    code: str
    """The folder that `bbu` is imported from."""
    current_folder: str
    """The folder in which the task runs."""
    cpus: int
    """CPUs that the task may use."""
    memory_mb: int
    """Memory of the node, in MB."""
    memory_limit_mb: int | None
    """Memory limit of the job's control groups, in MB; None where there is none."""
    shm_free: int
    """Free space of /dev/shm, in bytes."""
    temporary_folder: str
    """Where temporary files go; the profile's `scratch` sets it."""
    temporary_free: int
    """Free space of that folder, in bytes."""
    binds: list[BindFacts]
    """Every bind of the profile."""
    driver: str | None
    """Version of NVIDIA's kernel module; None where there is none."""
    interfaces: dict[str, str]
    """Network interfaces and their IPv4 addresses; an empty text for an interface without one."""
    host_address: str
    """The address that this host's name has on the host itself; gloo listens there if no interface is stated."""


@dataclass(frozen=True)
class FileFacts:
    """What a task sees of the shared folder. The facts below `met` need the other tasks: they stay at their defaults
    where the tasks did not meet.
    """

    token: str
    """The token of the plan that this task read."""
    clock_ahead_s: float
    """How far this node's clock is ahead of the filesystem's, in seconds."""
    fsync_s: float
    """Time to write 4 MB durably, in seconds."""
    has_locks: bool
    """Whether flock(2) works."""
    free: int
    """Free space of the filesystem, in bytes."""
    met: bool
    """Whether all tasks saw each other's files in time."""
    won: bool = False
    """Whether this task won the race for one name by link(2)."""
    link_error: str | None = None
    """Why link(2) failed, other than by losing the race."""
    visible_s: float = 0.0
    """Rank 0: longest time until all tasks answered a replaced file, in seconds."""
    broken_reads: list[str] = field(default_factory=list)
    """Other ranks: what was wrong with reads while the file was replaced."""


@dataclass(frozen=True)
class ReduceFacts:
    """What a task sees of torch, the GPUs and the sum over all tasks."""

    torch: str | None
    """Version of torch; None where it is not installed, and then nothing else is known."""
    cuda: str | None = None
    """Version of CUDA that torch was built for; None for a build without CUDA."""
    gpus: list[str] = field(default_factory=list)
    """Names of the GPUs that torch sees."""
    gpu_bytes: int | None = None
    """Memory of the one that has least; None without any."""
    gpu_error: str | None = None
    """Why torch cannot use the GPUs, in its own words."""
    backend: str = ""
    """nccl or gloo."""
    error: str | None = None
    """Why the sum failed, in torch's own words."""
    correct: bool = False
    """Whether every element of the sum was right."""
    seconds: float = 0.0
    """Time of one sum, in seconds: the median."""
    megabytes: int = 0
    """Size of the tensor, in MB."""
    interface: str | None = None
    """GLOO_SOCKET_IFNAME in the task's environment."""
    log: str = ""
    """The lines of NCCL's log that name its transport."""


@dataclass(frozen=True)
class StopFacts:
    """What the stop signal did to a task."""

    signal: str | None
    """Name of the signal; None if none came in time."""
    image_error: str | None = None
    """Why Python's files in the image could not be read after the signal."""


@dataclass(frozen=True)
class TaskReport:
    """One task's report. A task writes it anew after each stage, so that the login node sees how far the task came."""

    rank: int
    """The task's rank."""
    stage: Stage
    """What the task does now."""
    node: NodeFacts
    """Facts of the first moment."""
    files: FileFacts | None = None
    """None until FILES is over."""
    reduced: ReduceFacts | None = None
    """None until ALL_REDUCE is over."""
    stop: StopFacts | None = None
    """None until SIGNAL is over."""

    def write(self, folder: Path) -> None:
        """Replace this task's report in the folder of the tasks."""
        write_atomic(_report_path(folder, self.rank), json.dumps(asdict(self)))


def read_reports(folder: Path, tasks: int) -> dict[int, TaskReport]:
    """Read the reports that are there, by rank. A report is replaced in one step, so one that is there is complete."""
    paths = [_report_path(folder, rank) for rank in range(tasks)]
    return {rank: _report_of(read_json(path, JobError, _ADVICE)) for rank, path in enumerate(paths) if path.exists()}


def nodes_of(reports: Mapping[int, TaskReport]) -> dict[str, list[TaskReport]]:
    """Group reports by the name of their node, in the order of their ranks."""
    nodes: dict[str, list[TaskReport]] = {}
    for _, report in sorted(reports.items()):
        nodes.setdefault(report.node.name, []).append(report)
    return nodes


def files_of(reports: Sequence[TaskReport]) -> list[FileFacts]:
    """Return the facts of the shared folder, of the tasks that came that far."""
    return [report.files for report in reports if report.files]


def reduced_of(reports: Sequence[TaskReport]) -> list[ReduceFacts]:
    """Return the facts of the sum, of the tasks that came that far."""
    return [report.reduced for report in reports if report.reduced]


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _report_of(values: Mapping[str, Any]) -> TaskReport:
    node, files, reduced, stop = (values[name] for name in ("node", "files", "reduced", "stop"))
    binds = [BindFacts(**bind) for bind in node["binds"]]
    return TaskReport(
        rank=values["rank"],
        stage=values["stage"],
        node=NodeFacts(**node | {"binds": binds}),
        files=FileFacts(**files) if files else None,
        reduced=ReduceFacts(**reduced) if reduced else None,
        stop=StopFacts(**stop) if stop else None,
    )
