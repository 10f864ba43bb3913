"""Leases on a shared filesystem: one trainer for a run folder, one worker for an evaluation.

A lease is a series of files that share a prefix. Generation n is the file `{prefix}{n}`, and the process that made
the highest one holds the lease. The holder touches its file as a heartbeat. To take over, a process links generation
n+1, which only one can. Generations only grow, and nobody rewrites another's file: a holder that was taken for dead
finds a higher generation at its next check, and stops.

Nothing here trusts local clocks, advisory locks or cached attributes, none of which hosts share.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import age_of, create_once
from bbu.run.folder import RunFolder
from bbu.strict_json import JsonError, build_dataclass, read_json

_LONG_AGO = (0.0, 0.0)
"""Times of a file whose lease was given back: 1970, older than every timeout."""


@dataclass(frozen=True)
class LeaseFiles:
    """Where the generations of one lease lie, and what its holder is told when it has lost it."""

    folder: Path
    """folder of the files; it must exist"""
    prefix: str
    """what the names of the generations begin with; the number follows"""
    drafts: Path
    """folder on the same filesystem for unfinished files; it must exist"""
    lost: str
    """message of the error for a holder that another process has taken the lease from"""

    def path(self, generation: int) -> Path:
        return self.folder / f"{self.prefix}{generation}"

    def last_generation(self) -> int:
        """The highest generation; 0 where the lease was never taken."""
        names = (path.name for path in self.folder.iterdir() if path.name.startswith(self.prefix))
        numbers = (name.removeprefix(self.prefix) for name in names)
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def take(self, generation: int, content: Mapping[str, Any]) -> Lease | None:
        """Create a generation's file and so take the lease; None where another process was faster."""
        lease = Lease(self, generation)
        if not create_once(lease.path, json.dumps(content, ensure_ascii=False, allow_nan=False), self.drafts):
            return None
        if not lease.is_held():  # the number was free only because its file is history and was removed
            lease.path.unlink()
            return None
        return lease


class Lease:
    """One generation of a lease, taken by this process."""

    def __init__(self, files: LeaseFiles, generation: int) -> None:
        self.files, self.generation = files, generation
        self.path = files.path(generation)

    def is_held(self) -> bool:
        """Whether no other process has taken the lease since."""
        return self.files.last_generation() == self.generation

    def check(self) -> None:
        """Raise CheckpointError if another process has taken the lease; call before anything is published."""
        if not self.is_held():
            raise CheckpointError(self.files.lost)

    def heartbeat(self) -> None:
        """Show that the holder lives; raises CheckpointError if it no longer holds."""
        self.check()
        os.utime(self.path)

    def release(self) -> None:
        """Give the lease back, so that the next need not wait for the timeout. The file stays as the last generation.

        Does no harm after the lease was lost: it touches no file but its own.
        """
        with suppress(FileNotFoundError):
            os.utime(self.path, _LONG_AGO)


@contextmanager
def keep_alive(lease: Lease, interval_s: float) -> Iterator[Lease]:
    """Hold a lease for a block and give it back at the end.

    A thread sends the heartbeats, because a training step or a batch of predictions may take longer than the timeout.
    A lease lost meanwhile shows at `lease.check()`.

    Args:
        lease: a lease just taken.
        interval_s: seconds between heartbeats, a fraction of the timeout.
    """
    done = threading.Event()
    thread = threading.Thread(target=_send_heartbeats, args=(lease, done, interval_s), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        lease.release()


def _send_heartbeats(lease: Lease, done: threading.Event, interval_s: float) -> None:
    while not done.wait(interval_s):
        try:
            lease.heartbeat()
        except CheckpointError:  # lost; the main thread finds out by its own check
            return
        except OSError:  # a shared filesystem may stall for a while; the next heartbeat tries again
            continue


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder: a job and its restart, and the process behind it."""

    job_id: str
    """Slurm's job id, `local` outside of Slurm"""
    restart_count: int
    """how many times Slurm has requeued the job"""
    pid: int
    """process id of rank 0"""
    started: str
    """when that process started, in clock ticks since boot; tells it from a later one with the same pid"""
    place: str
    """the set of process ids that `pid` belongs to: host, boot and pid namespace"""

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str]) -> Owner:
        """Job id and restart count from Slurm's variables; `local` and 0 without them."""
        job_id = environ.get("SLURM_JOB_ID", "local")
        restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(job_id, restarts, os.getpid(), _start_time(os.getpid()), _place())

    def is_succeeded_by(self, other: Owner) -> bool:
        """Whether `other` is a later start of the same job: Slurm starts a job again only once it has ended."""
        same_job = self.job_id == other.job_id != "local"
        return same_job and other.restart_count > self.restart_count

    def is_dead_here(self) -> bool:
        """Whether the process ran where this one can see it, and is gone."""
        return self.place == _place() and _start_time(self.pid) != self.started


def take_run_lease(run: RunFolder, owner: Owner, timeout_s: float) -> Lease:
    """Take the right to train in a run folder. One process per run calls this: rank 0.

    The folder is free if nobody holds its lease, the holder gave it back, the holder is an earlier start of the same
    job or a dead process of this host, or it sent no heartbeat for `timeout_s` seconds.

    Raises:
        CheckpointError: the folder is in use; the message names the holder.
    """
    run.leases.mkdir(parents=True, exist_ok=True)
    lost = f"{run.root}: another trainer took over this run; stopping here"
    files = LeaseFiles(run.leases, "", run.leases, lost)
    last = files.last_generation()
    lease = None
    with suppress(FileNotFoundError):  # the last generation was removed, by a process that was faster
        if last:
            _refuse_if_held(run, files.path(last), owner, timeout_s)
        # `released` is for version 0.1, which sets it to true where `Lease.release` sets the times to 1970.
        lease = files.take(last + 1, {"released": False, **asdict(owner)})
    if lease is None:
        raise CheckpointError(f"{run.root}: another trainer has just taken this run folder; use another run_name")
    for old in range(1, last + 1):
        files.path(old).unlink(missing_ok=True)
    return lease


def held_lease(run: RunFolder, owner: Owner, timeout_s: float, interval_s: float) -> AbstractContextManager[Lease]:
    """Hold a run folder for a block, with a heartbeat every `interval_s` seconds.

    Raises CheckpointError if the folder is in use. A lease lost meanwhile shows at `lease.check()`.
    """
    return keep_alive(take_run_lease(run, owner, timeout_s), interval_s)


def _refuse_if_held(run: RunFolder, path: Path, owner: Owner, timeout_s: float) -> None:
    advice = "remove it if no trainer runs there"
    content = read_json(path, CheckpointError, advice)
    if content.pop("released", False):
        return
    try:
        holder, age = build_dataclass(Owner, content), age_of(path)
    except JsonError as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from error
    if holder.is_succeeded_by(owner) or holder.is_dead_here() or age > timeout_s:
        return
    raise CheckpointError(
        f"{run.root}: in use by job {holder.job_id} (restart {holder.restart_count}, process {holder.pid} on "
        f"{holder.place.partition(' ')[0]}, last heartbeat {age:.0f} s ago); stop it or use another run_name"
    )


def _place() -> str:
    """Name the set of process ids that this process sees: host, boot and pid namespace (a container may have its own).

    Without /proc it is the host alone; all start times are then empty, so that no process there is taken for dead.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # a zombie no longer writes; fields[18] is starttime (proc(5))
