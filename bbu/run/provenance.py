"""Where results come from: code, image, packages, data and job, as facts a reader can check later."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "flash-attn", "tokenizers", "pillow", "numpy", "scipy")
SLURM_FACTS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")


def code_hash(package: Path = PACKAGE) -> str:
    """SHA-256 over names and contents of this package's sources: true also of a tree with changes, or without git."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_digest(environ: Mapping[str, str]) -> str | None:
    """SHA-256 of the container image, as slurm/container.sh found it beside the image; None outside of one."""
    return environ.get("BBU_IMAGE_DIGEST") or None


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def slurm_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's variables that name this job, as far as they are set."""
    return {name: environ[name] for name in SLURM_FACTS if name in environ}


def job_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's variables that name this job, and the host."""
    return slurm_facts(environ) | {"host": socket.gethostname()}


def describe(environ: Mapping[str, str], data_files: Iterable[Path] = ()) -> dict[str, Any]:
    """One start of a run, as provenance.json keeps it."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": environ.get("BBU_COMMIT") or None,
        "code_sha256": code_hash(),
        "image_sha256": image_digest(environ),
        "packages": package_versions(),
        "data_sha256": {path.name: file_hash(path) for path in data_files},
        "job": job_facts(environ),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
