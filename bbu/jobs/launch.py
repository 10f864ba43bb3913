"""What every way of running a job needs: the tasks of submitit, the folder for their logs, the Python to run them."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.container import container_environment
from bbu.jobs.spec import JobSpec
from bbu.jobs.task import ContainerTask


@dataclass(frozen=True)
class Submission:
    """What became of one JobSpec, or of one of the arrays that it had to be cut into.

    job_ids: Slurm's, none for a job run here; folders: of logs, one for each id; exit_code: of a job run here;
    first, size: which elements of the whole these are.
    """

    name: str
    job_ids: tuple[str, ...]
    folders: tuple[Path, ...]
    exit_code: int | None
    first: int = 0
    size: int = 1

    def has(self, index: int) -> bool:
        """Whether element `index` of the whole is among these."""
        return self.first <= index < self.first + self.size

    def element(self, index: int) -> int | None:
        """Its number in the array; None where this is no array."""
        return index - self.first if self.size > 1 and self.job_ids else None


Note = Callable[[Submission], None]
"""Called with each job as soon as it exists: before it ends, and before the next one is submitted."""


def tasks_of(spec: JobSpec, profile: ClusterProfile, home: Path) -> list[ContainerTask]:
    """One task for each element of a job."""
    environment = container_environment(profile, home, spec.resources.gpus_per_node) | dict(spec.environment)
    return [
        ContainerTask(
            command=command,
            home=home,
            image=profile.image,
            environment=environment,
            max_requeues=spec.max_requeues,
            master_suffix=profile.master_suffix,
            grace_seconds=profile.signal_seconds,
        )
        for command in spec.commands
    ]


def new_folder(name: str, profile: ClusterProfile) -> Path:
    """A folder of its own per submission: submitit names files by job id, and process ids come again."""
    root = Path(profile.work_folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".gitignore").exists():  # it may lie in the checkout, and be shared
        (root / ".gitignore").write_text("*\n")
    folder = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-", dir=root))
    folder.chmod(0o755)
    return folder


def interpreter(home: Path) -> str:
    """This Python, able to import bbu from the checkout: submitit's pickles name its classes."""
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH", "")]))
    return shlex.join(["env", f"PYTHONPATH={path}", sys.executable])
