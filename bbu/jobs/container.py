"""How a job's Python command enters the container: the argv and environment of slurm/container.sh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bbu.jobs.clusters import ClusterProfile


def container_command(home: Path, image: str | None, command: tuple[str, ...]) -> list[str]:
    """The argv that runs `python COMMAND…` by way of slurm/container.sh, in the image or on the host.

    On the host it is the running interpreter, so that a virtual environment is kept.
    """
    python = "python" if image else sys.executable
    return ["bash", str(home / "slurm" / "container.sh"), python, *command]


def container_environment(profile: ClusterProfile, home: Path, gpus: int) -> dict[str, str]:
    """The variables slurm/container.sh reads for tasks with `gpus` GPUs per node, and the site's own."""
    environment = {
        "BBU_HOME": str(home),
        "BBU_IMAGE": os.path.abspath(profile.image) if profile.image else "",
        "BBU_IMAGE_SHA256": profile.image_sha256 or "",
        "BBU_CODE": profile.code,
        "BBU_BINDS": ",".join(profile.binds),
        "BBU_SCRATCH": profile.scratch or "",
        "BBU_SHIELD": profile.shield,
        "BBU_NV": "1" if gpus else "0",
    }
    return environment | interface_environment(profile.network_interface) | profile.environment


def interface_environment(interface: str | None) -> dict[str, str]:
    return {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}
