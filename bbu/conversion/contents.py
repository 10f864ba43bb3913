"""What a file held when it was read or written, and whether it holds the same now."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from bbu.conversion.names import printable_path
from bbu.conversion.rejects import Unusable

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
"""What may stand in place of a plain file; anything else is a device."""
MACHINE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
)
"""What the machine lacks. Such an error would meet every photo, so it is none of the photo that met it first."""
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""Of a file that has gone, or of a link that leads nowhere."""


@dataclass(frozen=True)
class FileFacts:
    """A file at one time: size and times say whether it may have changed since, the hash whether it did."""

    size: int
    """In bytes; -1 where there is no file."""
    mtime_ns: int
    """When its contents changed, as any program may state it."""
    ctime_ns: int
    """When it changed in any way, which the file system alone states."""
    sha256: str | None = None
    """SHA-256 of its bytes, in hex; None where they were not read."""


class HashBudget:
    """How much may still be read to find out whether files changed.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Take `size` bytes, if there are so many left."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def observe_file(path: Path) -> FileFacts:
    """Return what can be said of a file without reading it."""
    try:
        return _facts_of(path.stat())
    except OSError:
        return FileFacts(-1, 0, 0)


def read_file(path: Path, limit: int) -> tuple[bytes, FileFacts]:
    """Read a plain file.

    Args:
        path: the file.
        limit: of its size, in bytes.

    Returns:
        Its bytes; the facts about them.

    Raises:
        Unusable: it is no plain file, it is longer, or it cannot be read.
        OSError: this machine, not the file, is in trouble.
    """
    name = printable_path(path.name)
    try:
        # Opening a named pipe would wait for its writer, and opening a terminal would take it over.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            facts = os.fstat(descriptor)  # before the reading, so that a change during it shows later
            data = _read_plain(descriptor, facts.st_mode, min(facts.st_size, limit) + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        kind = _KINDS[stat.S_IFSOCK] if error.errno == errno.ENXIO else (error.strerror or str(error)).lower()
        reason = "missing_file" if error.errno in _MISSING else "unreadable_file"
        raise Unusable(reason, f"{name}: {kind} ({type(error).__name__})") from error
    if data is None:
        raise Unusable("no_plain_file", f"{name} is {_KINDS.get(stat.S_IFMT(facts.st_mode), 'a device')}")
    if len(data) > limit:
        raise Unusable("oversized_file", f"{name} has {facts.st_size} bytes, more than {limit}")
    return data, _facts_of(facts, data)


def confirm_facts(path: Path, facts: FileFacts, budget: HashBudget | None = None) -> FileFacts | None:
    """Say whether a file holds what it held when facts were taken.

    It is read only where its size or times differ.

    Args:
        path: the file.
        facts: of an earlier time.
        budget: how much may be read; without one, everything.

    Returns:
        The facts of now, about the same bytes; None where the file changed, or where the budget does not let us know.
    """
    now = observe_file(path)
    if now == replace(facts, sha256=None):
        return facts
    if facts.sha256 is None or now.size != facts.size or not (budget is None or budget.take(now.size)):
        return None
    try:
        _, now = read_file(path, facts.size)
    except Unusable:
        return None
    return now if now.sha256 == facts.sha256 else None


def write_file(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old bytes or the new, never a part.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    # Not the file's name and more, which may be too long for a name.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def _facts_of(facts: os.stat_result, data: bytes | None = None) -> FileFacts:
    sha256 = None if data is None else hashlib.sha256(data).hexdigest()
    return FileFacts(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, sha256)


def _read_plain(descriptor: int, mode: int, size: int) -> bytes | None:
    """The first bytes of a plain file, `size` at most; None for anything else."""
    if not stat.S_ISREG(mode):
        return None
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(size)
