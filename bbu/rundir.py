"""The run folder: where everything of one run lies, its status and the lease that keeps it to one trainer.

A run folder is usually on a shared filesystem, so nothing here trusts local clocks or advisory locks: files
are replaced by rename, a lease is taken by link(2), and its age is judged by the filesystem's own clock.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
RUN_CONFIG = "run_config.yaml"
"""The resolved run config inside a checkpoint."""
HEAD_KEY = "bbu_detection_head"
"""Where a model folder's config.json describes its detection head."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    `config.yaml provenance.json status.json jobs.jsonl checkpoint-{step}/ logs/ tensorboard/ eval/`
    """

    root: Path

    @classmethod
    def of(cls, output_root: str | Path, run_name: str) -> RunFolder:
        """The folder of a run by its two config fields; creates nothing."""
        return cls(Path(output_root) / f"output-{run_name}")

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def leases(self) -> Path:
        return self.root / ".lease"

    def create(self) -> RunFolder:
        """Make the folder and its fixed subfolders; does nothing to what is there already."""
        for folder in (self.logs, self.tensorboard, self.eval):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def checkpoint(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending by number; says nothing about their integrity."""
        names = (CHECKPOINT_NAME.fullmatch(path.name) for path in self.root.glob("checkpoint-*") if path.is_dir())
        # a padded name (checkpoint-007) is not one of ours: checkpoint(7) would not find it
        return sorted(int(m[1]) for m in names if m and m[1] == str(int(m[1])))


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


def write_status(run: RunFolder, status: Mapping[str, Any]) -> None:
    """Replace `status.json`, atomically. Raises ValueError for NaN, which is not JSON."""
    write_atomic(run.status, json.dumps(dict(status), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_status(run: RunFolder) -> dict[str, Any] | None:
    """The content of `status.json`, None where there is none yet. Raises CheckpointError if it is not JSON."""
    try:
        return json.loads(run.status.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{run.status}: not JSON; remove it, the next heartbeat writes it anew") from error


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


def age_of(path: Path) -> float:
    """Seconds since a file was touched, by the filesystem's clock: hosts disagree, the file server is one.

    Opened, not just looked up: NFS asks the server for an opened file's times, and else may answer from a cache.
    """
    with tempfile.TemporaryFile(dir=path.parent) as probe, path.open("rb") as file:
        return os.fstat(probe.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime


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
