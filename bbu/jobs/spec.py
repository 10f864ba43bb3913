"""What a job is, without a word about who runs it: the middle step between a command line and submitit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bbu.errors import JobError


@dataclass(frozen=True)
class JobSpec:
    """One job, or one array of jobs that differ in their arguments alone.

    `commands` holds what follows `python`, once per array element: `(("-m", "bbu.train", "--config", "smoke"),)`.
    Each element runs as `nodes` x `tasks_per_node` tasks. `memory_gb` is per node, None leaves it to Slurm;
    `time_minutes` is the wall-clock limit; `max_requeues` caps how often the job goes back into the queue after a
    stop with its state saved. `after` names jobs of the same submission (by `name`) that must end well before this
    one begins. Raises JobError for a job that could never run.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    memory_gb: float | None
    time_minutes: int
    after: tuple[str, ...] = ()
    max_requeues: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.commands or not all(self.commands):
            raise JobError(f"job {self.name}: no command; state what follows `python`")
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "time_minutes"):
            if getattr(self, name) < 1:
                raise JobError(f"job {self.name}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.gpus_per_node < 0:
            raise JobError(f"job {self.name}: gpus_per_node is {self.gpus_per_node}; it must be 0 or more")

    @property
    def is_array(self) -> bool:
        return len(self.commands) > 1

    @property
    def tasks(self) -> int:
        """The number of ranks of one element."""
        return self.nodes * self.tasks_per_node


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
