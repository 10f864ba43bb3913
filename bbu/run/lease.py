"""The lease that keeps a run folder to one trainer.

A run folder is usually on a shared filesystem, so nothing here trusts local clocks or advisory locks: a lease is taken
by link(2), and its age is judged by the filesystem's own clock.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bbu.errors import CheckpointError
from bbu.run.files import age_of, sync_folder, write_atomic
from bbu.run.folder import RunFolder


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: a job and its restart, and the process behind it."""

    job_id: str
    restart_count: int
    pid: int
    started: str
    place: str

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str]) -> Owner:
        """Job id and restart count from Slurm's variables; `local` and 0 without them."""
        job_id = environ.get("SLURM_JOB_ID", "local")
        restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(job_id, restarts, os.getpid(), _start_time(os.getpid()), _place())

    def is_succeeded_by(self, other: Owner) -> bool:
        """Slurm starts a job again only once its former start is over."""
        same_job = self.job_id == other.job_id != "local"
        return same_job and other.restart_count > self.restart_count

    def is_dead_here(self) -> bool:
        """Whether the process ran where we can see it, and is gone."""
        return self.place == _place() and _start_time(self.pid) != self.started


def _place() -> str:
    """Names one set of process ids: host, boot and pid namespace (a container may have its own).

    Without /proc it is the host alone; start times are then all empty, so that nobody there is taken for dead.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot; empty if there is none. Tells a reused pid from its forerunner."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # a zombie no longer writes


class Lease:
    """The right to train in a run folder: generation n is the file `.lease/n`, and the highest one holds.

    Taking over means linking generation n+1, which only one contender can. A holder that was taken for dead
    finds a higher generation at its next `check` and must stop; no file of its is ever rewritten by others.
    """

    def __init__(self, folder: Path, generation: int, owner: Owner) -> None:
        self.path = folder / str(generation)
        self.generation = generation
        self.owner = owner

    @classmethod
    def take(cls, run: RunFolder, owner: Owner, timeout_s: float) -> Lease:
        """Take the lease, or raise CheckpointError naming the holder. One process per run: rank 0.

        It is free if there was none, it was given back, its holder is an earlier start of the same job or a
        dead process of this host, or it had no heartbeat for `timeout_s` seconds.
        """
        run.leases.mkdir(parents=True, exist_ok=True)
        last = _last_generation(run.leases)
        lease = cls(run.leases, last + 1, owner)
        try:
            if last:
                _refuse_if_held(run, run.leases / str(last), owner, timeout_s)
            lease._link()
        except (FileNotFoundError, FileExistsError) as error:  # removed, or linked, by one who was faster
            text = f"{run.root}: another trainer has just taken this run folder; use another run_name"
            raise CheckpointError(text) from error
        for old in range(1, last + 1):
            (run.leases / str(old)).unlink(missing_ok=True)
        return lease

    def heartbeat(self) -> None:
        """Say that the holder lives; raises CheckpointError if it no longer holds."""
        self.check()
        os.utime(self.path)

    def check(self) -> None:
        """Raise CheckpointError if another trainer has taken over; call before anything is published."""
        if _last_generation(self.path.parent) != self.generation:
            raise CheckpointError(f"{self.path.parent.parent}: another trainer took over this run; stopping here")

    def release(self) -> None:
        """Give the lease back. The file stays: generations only grow."""
        if _last_generation(self.path.parent) == self.generation:
            write_atomic(self.path, json.dumps({"released": True}))

    def _link(self) -> None:
        """Make the generation's file, complete from the start; raises FileExistsError if somebody was first."""
        draft = self.path.parent / f".draft-{os.getpid()}-{socket.gethostname()}"
        write_atomic(draft, json.dumps({"released": False, **asdict(self.owner)}))
        try:
            os.link(draft, self.path)
        finally:
            draft.unlink()
        if _last_generation(self.path.parent) != self.generation:  # our number was free only because it is history
            self.path.unlink()
            raise FileExistsError(self.path)
        sync_folder(self.path.parent)


def _last_generation(folder: Path) -> int:
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def _refuse_if_held(run: RunFolder, path: Path, owner: Owner, timeout_s: float) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("released"):
        return
    holder, age = Owner(**content), age_of(path)
    if holder.is_succeeded_by(owner) or holder.is_dead_here() or age > timeout_s:
        return
    raise CheckpointError(
        f"{run.root}: in use by job {holder.job_id} (restart {holder.restart_count}, process {holder.pid} on "
        f"{holder.place.split()[0]}, last heartbeat {age:.0f} s ago); stop it or use another run_name"
    )


@contextmanager
def held_lease(run: RunFolder, owner: Owner, timeout_s: float, interval_s: float) -> Iterator[Lease]:
    """Hold the lease for a block, with a heartbeat from a thread every `interval_s` seconds (a step may be long).

    Raises CheckpointError if the folder is in use. A lease lost meanwhile shows at `lease.check()`.
    """
    lease = Lease.take(run, owner, timeout_s)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, done, interval_s), name="lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        done.set()
        beating.join()
        lease.release()


def _beat(lease: Lease, done: threading.Event, interval_s: float) -> None:
    while not done.wait(interval_s):
        try:
            lease.heartbeat()
        except CheckpointError:  # the main thread learns it from its own check
            return
        except OSError:  # a shared filesystem may stall for a while; the next beat tries again
            continue
