"""What a job is, without a word about who runs it: the middle step between a command line and submitit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bbu.errors import JobError

_JOB_NAME_PREFIX = "bbu-"


def job_name(kind: str) -> str:
    """Return the name under which Slurm lists a job of this kind: `train` is called `bbu-train`."""
    return _JOB_NAME_PREFIX + kind


def job_kind(name: str) -> str | None:
    """Return the kind of a job by its name in Slurm: `train` for `bbu-train`, None for a job that is not ours."""
    return name.removeprefix(_JOB_NAME_PREFIX) if name.startswith(_JOB_NAME_PREFIX) else None


@dataclass(frozen=True)
class Resources:
    """What one kind of job asks of its site. partition, account, qos, constraint: as sbatch takes them, null to
    leave out. Field by field:

    exclusive: whole nodes, nobody else's jobs beside ours; gpus_per_node: one task is started per GPU, at least one
    per node; gpu_type: `a100`, null for any; memory: `512G` per node, `8G per cpu`, `64G per gpu`, `all` the node
    has (nodes may differ), null for the site's default; time_minutes: the wall-clock limit; nice: how far to stand
    back behind other jobs, 0 to 10000.
    """

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclusive: bool
    gpus_per_node: int
    gpu_type: str | None
    cpus_per_task: int
    memory: str | None
    time_minutes: int
    nice: int

    @property
    def tasks_per_node(self) -> int:
        """Of a job that uses all of this: one for each GPU, one where there is none."""
        return max(1, self.gpus_per_node)


@dataclass(frozen=True)
class JobSpec:
    """One job, or one array of jobs that differ in their arguments alone.

    `commands` holds what follows `python`, once per array element: `(("-m", "bbu.train", "--config", "smoke"),)`.
    Each element runs as `nodes` x `tasks_per_node` tasks. `max_requeues` caps how often the job goes back into the
    queue after a stop with its state saved. `after` names jobs of the same submission (by `name`), and
    `after_jobs` jobs in the queue (by Slurm's id), that must end before this one begins: well, or `after_any` how.
    Raises JobError for a job that could never run.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    nodes: int
    tasks_per_node: int
    resources: Resources
    after: tuple[str, ...] = ()
    after_jobs: tuple[str, ...] = ()
    after_any: bool = False
    max_requeues: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

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
        """The same job in arrays of at most `size` elements."""
        for start in range(0, len(self.commands), size):
            yield dataclasses.replace(self, commands=self.commands[start : start + size])


def in_order(specs: tuple[JobSpec, ...]) -> tuple[JobSpec, ...]:
    """The same jobs, checked: names are unique and each waits only for jobs that come before it."""
    seen: set[str] = set()
    for spec in specs:
        missing = [name for name in spec.after if name not in seen]
        if missing:
            raise JobError(f"job {spec.name} waits for {', '.join(missing)}, which does not come before it")
        if spec.name in seen:
            raise JobError(f"two jobs are called {spec.name}; names must differ within one submission")
        seen.add(spec.name)
    return specs
