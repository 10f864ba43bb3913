"""What every way of running a job needs: the tasks of submitit with their command lines and variables, a folder for
their logs, and the Python that starts them.
"""

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
from bbu.jobs.spec import JobSpec
from bbu.jobs.task import ContainerTask

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder with the code."""


@dataclass(frozen=True)
class Submission:
    """What became of one JobSpec, or of one of the arrays into which it had to be cut."""

    name: str
    """The name of the JobSpec."""
    job_ids: tuple[str, ...]
    """Slurm's ids; empty for a job that ran on this machine."""
    folders: tuple[Path, ...]
    """Folders of logs, one for each id; a single one for a job that ran on this machine."""
    exit_code: int | None
    """Exit code of a job that ran on this machine; None under Slurm, and before the job has ended."""
    first: int = 0
    """Index, in the JobSpec, of the first element that is part of this submission."""
    size: int = 1
    """Number of elements that are part of this submission."""

    def has(self, index: int) -> bool:
        """Return whether element `index` of the JobSpec is part of this submission."""
        return self.first <= index < self.first + self.size

    def element(self, index: int) -> int | None:
        """Return the number in Slurm's array of element `index` of the JobSpec; None where there is no array."""
        return index - self.first if self.size > 1 and self.job_ids else None


Note = Callable[[Submission], None]
"""Called with each job as soon as it exists: before it ends, and before the next one is submitted."""


def task_command(checkout: Path, image: str | None, command: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command line by which one rank runs `python COMMAND…`, in the image or on the host.

    On the host it is the interpreter of this process, so that a virtual environment is kept.

    Args:
        checkout: the folder with the code.
        image: the container image; None to run on the host.
        command: what follows `python`.
    """
    python = "python" if image else sys.executable
    return ("bash", str(checkout / "slurm" / "task.sh"), python, *command)


def task_environment(profile: ClusterProfile, checkout: Path, gpus: int) -> dict[str, str]:
    """Return the variables that slurm/task.sh, slurm/container.sh and the trainer read, and the site's own.

    Args:
        profile: the site.
        checkout: the folder with the code.
        gpus: GPUs per node that the job requests.
    """
    environment = {
        "BBU_HOME": str(checkout),
        "BBU_IMAGE": os.path.abspath(profile.image) if profile.image else "",
        "BBU_IMAGE_SHA256": profile.image_sha256 or "",
        "BBU_CODE": profile.code,
        "BBU_BINDS": ",".join(profile.binds),
        "BBU_SCRATCH": profile.scratch or "",
        "BBU_SHIELD": profile.shield,
        "BBU_NV": "1" if gpus else "0",
        "BBU_MASTER_SUFFIX": profile.master_suffix,
        "BBU_SIGNAL_SECONDS": str(profile.signal_seconds),
    }
    return environment | _interface_environment(profile.network_interface) | profile.environment


def _interface_environment(interface: str | None) -> dict[str, str]:
    return {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}


def job_environment(spec: JobSpec, profile: ClusterProfile, checkout: Path) -> dict[str, str]:
    """Return the variables that all tasks of a job share."""
    environment = task_environment(profile, checkout, spec.resources.gpus_per_node)
    return environment | {"BBU_MAX_REQUEUES": str(spec.max_requeues)} | dict(spec.environment)


def tasks_of(spec: JobSpec, profile: ClusterProfile, checkout: Path) -> list[ContainerTask]:
    """Return one task for each element of a job."""
    environment = job_environment(spec, profile, checkout)
    return [
        ContainerTask(task_command(checkout, profile.image, command), environment, profile.signal_seconds)
        for command in spec.commands
    ]


def new_folder(name: str, profile: ClusterProfile) -> Path:
    """Make a folder for one submission: submitit names files by job id, and process ids are used again."""
    root = Path(profile.work_folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".gitignore").exists():  # it may lie in the checkout, and be shared
        (root / ".gitignore").write_text("*\n")
    folder = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-", dir=root))
    folder.chmod(0o755)
    return folder


def python_command(checkout: Path) -> str:
    """Return the shell words that start this Python with the checkout on its path: pickles name classes of bbu."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    return shlex.join(["env", f"PYTHONPATH={path}", sys.executable])
