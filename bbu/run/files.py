"""Files on a shared filesystem: replaced whole, flushed to disk, linked once, dated by the file server's clock."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

_READABLE_BY_ALL = 0o644
"""Mode of what we write: mkstemp's own 0600 would hide it from the rest of the group."""


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a machine after a crash, sees the old text or the new, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), _READABLE_BY_ALL)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_once(path: Path, text: str, drafts: Path) -> bool:
    """Create a file, complete from the start, unless its name is taken.

    Of several processes on any hosts that call this for one path, exactly one succeeds: the text is written to a
    draft, and link(2), which is atomic on NFS too, gives the draft its final name.

    Args:
        path: the file to create.
        text: its content.
        drafts: an existing folder on the same filesystem for the draft.

    Returns:
        Whether this call created the file.
    """
    draft = drafts / f".draft-{uuid.uuid4().hex}"
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), _READABLE_BY_ALL)
            file.flush()
            os.fsync(file.fileno())
        os.utime(draft)  # the file's age counts from now, although the sync may have taken long
        try:
            os.link(draft, path)
        except FileExistsError:
            # Where NFS loses the reply to our link, it asks the server again, and the second answer is "exists".
            # A second name on our draft shows that the link was ours (open(2), under O_EXCL).
            if _server_stat(draft).st_nlink != 2:
                return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names made or renamed in it outlive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def age_of(path: Path) -> float:
    """Return the seconds since a file was last touched, by the one clock that all hosts share: the file server's."""
    with tempfile.TemporaryFile(dir=path.parent) as probe:  # a new file gives the time now
        return os.fstat(probe.fileno()).st_mtime - _server_stat(path).st_mtime


def _server_stat(path: Path) -> os.stat_result:
    """Stat a file by opening it: NFS then asks the server, while a plain stat may be answered from the cache."""
    with path.open("rb") as file:
        return os.fstat(file.fileno())
