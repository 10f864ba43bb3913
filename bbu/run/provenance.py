"""Where results come from: code, image, packages, data and job, as facts that a reader can check later."""

from __future__ import annotations

import ast
import hashlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder
from bbu.strict_json import JsonError, build_dataclass, read_json

_PACKAGE = Path(__file__).resolve().parents[1]
_RECORDED_PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "flash-attn", "tokenizers", "pillow", "numpy", "scipy",
)  # fmt: skip
SLURM_FACTS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
"""Slurm's variables that name a job and its place."""


@dataclass(frozen=True)
class RunStart:
    """One start of a run, as `provenance.json` keeps it under `starts`."""

    started: str
    """local time with the offset from UTC"""
    commit: str | None
    """git commit of the code; None where it is not known"""
    code_sha256: str
    """hash of the sources that ran"""
    image_sha256: str | None
    """hash of the container image; None outside of one"""
    packages: Mapping[str, str | None]
    """versions of the packages that results depend on; None for one that is not installed"""
    data_sha256: Mapping[str, str]
    """hash of each data file, by its name; empty where an older version did not take them"""
    job: Mapping[str, str]
    """Slurm's variables of the job (`SLURM_FACTS`), and the host"""


def record_start(run: RunFolder, environ: Mapping[str, str], data_files: Iterable[Path]) -> None:
    """Append this start of a run to `provenance.json`.

    Args:
        run: the run that starts.
        environ: the environment, for Slurm's variables, the commit and the image.
        data_files: the files to record a hash of.
    """
    start = RunStart(
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        commit=environ.get("BBU_COMMIT") or None,
        code_sha256=code_hash(),
        image_sha256=image_digest(environ),
        packages=package_versions(_RECORDED_PACKAGES),
        data_sha256={path.name: file_hash(path) for path in data_files},
        job=job_facts(environ),
    )
    # Earlier starts stay as they are, whatever version wrote them.
    starts = _earlier_starts(run)
    write_atomic(run.provenance, json.dumps({"starts": [*starts, asdict(start)]}, ensure_ascii=False, indent=1) + "\n")


def latest_start(run: RunFolder) -> RunStart:
    """Read the newest entry of `provenance.json`; raises CheckpointError where there is none of this version."""
    starts = _earlier_starts(run)
    try:
        return build_dataclass(RunStart, starts[-1] if starts else None)
    except JsonError as error:
        raise CheckpointError(f"{run.provenance}: its newest start cannot be read ({error}); start again") from error


def _earlier_starts(run: RunFolder) -> list[Any]:
    if not run.provenance.exists():
        return []
    advice = "move it away, the next start writes a new one"
    starts = read_json(run.provenance, CheckpointError, advice).get("starts")
    if not isinstance(starts, list):
        raise CheckpointError(f"{run.provenance}: no list of starts; {advice}")
    return starts


def code_hash(package: Path = _PACKAGE) -> str:
    """SHA-256 over names and contents of this package's sources: true also of a tree with changes, or without git."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def computing_code_hash(parts: Iterable[str], package: Path = _PACKAGE) -> str:
    """SHA-256 over what some parts of this package compute.

    Comments, docstrings and layout do not count, because the hash is taken over the syntax trees.

    Args:
        parts: files (`boxes.py`) and folders (`data`) of the package; one that does not exist is an error.
        package: the package's folder.
    """
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in _sources_of(package / part)):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [statement for statement in node.body if not _is_text(statement)]
        digest.update(f"{path.relative_to(package).as_posix()}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_digest(environ: Mapping[str, str]) -> str | None:
    """SHA-256 of the container image, as slurm/container.sh found it beside the image; None outside of one."""
    return environ.get("BBU_IMAGE_DIGEST") or None


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of installed packages; None for one that is not installed."""
    return {name: _version(name) for name in names}


def slurm_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's variables that name this job, as far as they are set."""
    return {name: environ[name] for name in SLURM_FACTS if name in environ}


def job_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's variables that name this job, and the host."""
    return slurm_facts(environ) | {"host": socket.gethostname()}


def _sources_of(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(path)
    return [path] if path.suffix == ".py" else list(path.rglob("*.py"))


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a bare string: a docstring, or the words under a constant or field."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
