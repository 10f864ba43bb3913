"""What a job is, whoever runs it: the step between a request and submitit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from bbu.config.kinds import ProfileText, pattern_rule, range_rule
from bbu.errors import JobError

_JOB_NAME_PREFIX = "bbu-"


def job_name(kind: str) -> str:
    """Return the name under which Slurm lists a job of this kind: `train` is called `bbu-train`."""
    return _JOB_NAME_PREFIX + kind


def job_kind(name: str) -> str | None:
    """Return the kind of a job by its name in Slurm: `train` for `bbu-train`, None for a job that is not ours."""
    return name.removeprefix(_JOB_NAME_PREFIX) if name.startswith(_JOB_NAME_PREFIX) else None


_Memory = Annotated[
    ProfileText, pattern_rule(r"all|\d+[MGT](?: per (?:cpu|gpu))?", "be 512G, 8G per cpu, 64G per gpu or all")
]


@dataclass(frozen=True)
class Resources:
    """What one kind of job requests from its site; the keys of a cluster profile under train, convert and eval."""

    partition: ProfileText | None
    """As sbatch takes it; null leaves it out."""
    account: ProfileText | None
    """As sbatch takes it; null leaves it out."""
    qos: ProfileText | None
    """As sbatch takes it; null leaves it out."""
    constraint: ProfileText | None
    """Features that the nodes must have, as sbatch takes them; null leaves it out."""
    exclusive: bool
    """Request whole nodes, without other jobs on them."""
    gpus_per_node: Annotated[int, range_rule(0, 1024)]
    """GPUs of each node; one task is started per GPU, at least one per node."""
    gpu_type: ProfileText | None
    """Type of the GPUs, such as `a100`; null takes any."""
    cpus_per_task: Annotated[int, range_rule(1, 4096)]
    """CPUs of each task."""
    memory: _Memory | None
    """`512G` per node, `8G per cpu`, `64G per gpu`, or `all` that the node has (nodes may differ); null takes the
    site's default."""
    time_minutes: Annotated[int, range_rule(1, 525_600)]  # a year
    """Time limit of the job, in minutes."""
    nice: Annotated[int, range_rule(0, 10_000)]
    """Slurm's `--nice`; a higher value lowers the priority."""

    @property
    def tasks_per_node(self) -> int:
        """Tasks on each node of a job that uses all of it: one per GPU, one where there is none."""
        return max(1, self.gpus_per_node)

    @property
    def memory_mb(self) -> int:
        """Memory that a job requests of each node, in MB; 0 where the site decides or the node gives all it has."""
        match = re.fullmatch(r"(\d+)([MGT])(?: per (cpu|gpu))?", self.memory or "")
        if not match:
            return 0
        shares = {None: 1, "cpu": self.tasks_per_node * self.cpus_per_task, "gpu": self.gpus_per_node}
        return int(match[1]) * {"M": 1, "G": 1024, "T": 1024**2}[match[2]] * shares[match[3]]


@dataclass(frozen=True)
class JobSpec:
    """One job, or one array of jobs that differ in their arguments alone.

    Raises JobError for a job that could never run.
    """

    name: str
    """The kind of job: `train`, `convert`, `merge`, `eval`, `compare`, `demo`. Unique within one submission."""
    commands: tuple[tuple[str, ...], ...]
    """What follows `python`, one for each element of the array: `(("-m", "bbu.train", "--config", "smoke"),)`."""
    nodes: int
    """Nodes of each element."""
    tasks_per_node: int
    """Tasks on each of its nodes."""
    resources: Resources
    """What each element requests from the site."""
    after: tuple[str, ...] = ()
    """Names of jobs of the same submission that must end before this one begins."""
    after_jobs: tuple[str, ...] = ()
    """Slurm's ids of other jobs that must end before this one begins."""
    after_any: bool = False
    """Whether this job begins however those end; else it begins only if they succeed."""
    max_requeues: int = 0
    """How often the job is requeued after a stop with its state saved."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables for its tasks."""

    def __post_init__(self) -> None:
        if not self.commands or not all(self.commands):
            raise JobError(f"job {self.name}: no command; state what follows `python`")
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) < 1:
                raise JobError(f"job {self.name}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.resources.gpus_per_node < 0:
            raise JobError(f"job {self.name}: gpus_per_node is {self.resources.gpus_per_node}; it must be 0 or more")

    @property
    def is_array(self) -> bool:
        return len(self.commands) > 1

    @property
    def tasks(self) -> int:
        """The number of ranks of one element."""
        return self.nodes * self.tasks_per_node

    def chunks(self, size: int) -> Iterator[JobSpec]:
        """The same job in arrays of at most `size` elements each."""
        for start in range(0, len(self.commands), size):
            yield dataclasses.replace(self, commands=self.commands[start : start + size])


def check_order(specs: Sequence[JobSpec]) -> None:
    """Check that names are unique and that each job waits only for jobs before it. Raises JobError."""
    earlier: set[str] = set()
    for spec in specs:
        missing = [name for name in spec.after if name not in earlier]
        if missing:
            raise JobError(f"job {spec.name} waits for {', '.join(missing)}, which does not come before it")
        if spec.name in earlier:
            raise JobError(f"two jobs are called {spec.name}; names must differ within one submission")
        earlier.add(spec.name)
