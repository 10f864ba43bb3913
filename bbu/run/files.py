"""Files on a shared filesystem: replaced whole, flushed to disk, their age judged by the file server's clock."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a machine after a crash, finds the old text or the new, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide it from the group
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names made or renamed in it outlive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def age_of(path: Path) -> float:
    """Seconds since a file was touched, by the filesystem's clock: hosts disagree, the file server is one.

    Opened, not just looked up: NFS asks the server for an opened file's times, and else may answer from a cache.
    """
    with tempfile.TemporaryFile(dir=path.parent) as probe, path.open("rb") as file:
        return os.fstat(probe.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
