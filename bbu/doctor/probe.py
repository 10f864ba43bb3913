"""What the doctor looks at on a compute node, from inside the container: one process for each task.

The tasks share one folder. A task writes its report anew after every stage, so that the login node sees how far a task
came that hangs or dies. Every wait has a limit.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import site
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bbu.doctor.report import (
    ALL_REDUCE,
    DONE,
    FILES,
    SIGNAL,
    BindFacts,
    FileFacts,
    NodeFacts,
    Plan,
    ReduceFacts,
    StopFacts,
    TaskReport,
)
from bbu.errors import PREEMPTED_EXIT_CODE, JobError
from bbu.run.files import sync_folder, write_atomic
from bbu.strict_json import parse_json
from bbu.training.preemption import StopFlag, install_stop_handlers

_ROUNDS = 3
"""How often rank 0 replaces its file."""
_POLL_S = 0.005
_SETTLE_S = 0.5
"""A process that serves the image is gone this long after the signal that ended it."""
_LEAVING_S = 0.5
"""Time for the other tasks to leave their containers."""
_WRITE_BYTES = 4 << 20
_LATE_MODULES = ("sqlite3", "decimal", "xml.dom.minidom", "wave", "imaplib", "plistlib")
"""Modules of Python that nothing here uses: after a signal they must still be read from the image."""
_SIOCGIFADDR = 0x8915
"""The ioctl that returns an interface's IPv4 address; see netdevice(7)."""


def run_probe(folder: Path) -> int:
    """Look at this node as one task of the doctor's job, and report.

    Returns:
        1 if no stop signal came; else, on rank 0, the code of a job that saved its state; 0 on the other ranks.
    """
    flag = install_stop_handlers()
    plan = Plan.read(folder)
    if "RANK" not in os.environ:
        raise JobError("RANK is not set: the container hides the variables of slurm/task.sh")
    return _Probe(folder, plan, flag).run()


@dataclass
class _Probe:
    """One task's look at its node."""

    folder: Path
    """The folder that the tasks share."""
    plan: Plan
    """What the login node wrote for the tasks."""
    flag: StopFlag
    """Set by the stop signal, as the trainer has it."""

    def __post_init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def run(self) -> int:
        """Go through all stages and write a report before each."""
        report = TaskReport(self.rank, FILES, _node_facts(self.plan, os.environ))
        report.write(self.folder)
        report = replace(report, stage=ALL_REDUCE, files=self._file_facts())
        report.write(self.folder)
        report = replace(report, stage=SIGNAL, reduced=_reduce_facts(self.plan, self.folder, self.rank))
        report.write(self.folder)
        stop = self._stop_facts()
        replace(report, stage=DONE if stop.signal else SIGNAL, stop=stop).write(self.folder)
        return self._leave() if stop.signal else 1

    def _leave(self) -> int:
        """End rank 0 last and alone with a code: the first task with a code ends the others (--kill-on-bad-exit)."""
        if self.rank:
            self._arrive("end")
            return 0
        self._meet("end")
        time.sleep(_LEAVING_S)
        return PREEMPTED_EXIT_CODE

    def _arrive(self, name: str) -> None:
        self._arrival(name, self.rank).touch()

    def _meet(self, name: str) -> bool:
        """Wait until all tasks are here; False if some did not come in time."""
        self._arrive(name)
        arrivals = [self._arrival(name, rank) for rank in range(self.world_size)]
        return _wait_until(lambda: all(path.exists() for path in arrivals), self.plan.patience_s)

    def _arrival(self, name: str, rank: int) -> Path:
        return self.folder / f"at-{name}-{rank}"

    def _file_facts(self) -> FileFacts:
        """Try the shared filesystem for what checkpoints, leases and the eval ledger need of it."""
        met, won, link_error, visible_s, broken_reads = self._meet("files"), False, None, 0.0, []
        if met:
            won, link_error = self._race()
        if met and self.world_size > 1:
            visible_s, broken_reads = self._replace_file() if self.rank == 0 else self._read_replaced_file()
        return FileFacts(
            token=self.plan.token,
            clock_ahead_s=clock_ahead_s(self.folder),
            fsync_s=_durable_write_s(self.folder),
            has_locks=_has_locks(self.folder),
            free=shutil.disk_usage(self.folder).free,
            met=met,
            won=won,
            link_error=link_error,
            visible_s=visible_s,
            broken_reads=broken_reads,
        )

    def _race(self) -> tuple[bool, str | None]:
        """Compete with all tasks for one name, which link(2) must give to one of them.

        Returns whether this task won, and why link(2) failed.
        """
        draft = self.folder / f"draft-{self.rank}"
        draft.write_text(str(self.rank))
        try:
            os.link(draft, self.folder / "winner")
        except FileExistsError:
            return False, None
        except OSError as error:  # finding a filesystem without hard links is a purpose of this
            return False, str(error)
        return True, None

    def _replace_file(self) -> tuple[float, list[str]]:
        """Rank 0: replace a file again and again.

        Returns the longest time until all others answered, in seconds, and no broken reads. All times are taken here,
        so that no difference between the nodes' clocks enters.
        """
        return max(self._replace_once(number) for number in range(1, _ROUNDS + 1)), []

    def _replace_once(self, number: int) -> float:
        """Seconds until all others have seen a new file and rank 0 has seen their answers."""
        # The filler makes the file long enough for an incomplete one to be noticed.
        write_atomic(self.folder / "ping", json.dumps({"round": number, "filler": "x" * 4096}))
        start, broken_reads = time.monotonic(), []
        names = [f"pong-{rank}" for rank in range(1, self.world_size)]
        _wait_until(lambda: all(self._sees(name, number, broken_reads) for name in names), self.plan.patience_s)
        return time.monotonic() - start

    def _read_replaced_file(self) -> tuple[float, list[str]]:
        """Other ranks: answer each round of rank 0's file. Returns no time, and what was wrong with the reads."""
        broken_reads: list[str] = []
        for number in range(1, _ROUNDS + 1):
            if not _wait_until(lambda number=number: self._sees("ping", number, broken_reads), self.plan.patience_s):
                broken_reads.append(f"round {number} was not seen")
                break
            write_atomic(self.folder / f"pong-{self.rank}", json.dumps({"round": number}))
        return 0.0, broken_reads

    def _sees(self, name: str, number: int, broken_reads: list[str]) -> bool:
        """Whether the file holds this round or a later one. A replaced file must never be missing or incomplete."""
        try:
            return parse_json((self.folder / name).read_bytes())["round"] >= number
        except FileNotFoundError:
            if number > 1:
                broken_reads.append(f"{name} was missing while it was replaced")
        except (OSError, ValueError) as error:  # a stale handle, a part of the text
            broken_reads.append(f"{name}: {error}")
        return False

    def _stop_facts(self) -> StopFacts:
        """Wait for the stop signal; after it Python must run on, and the image must still be there."""
        if not _wait_until(lambda: self.flag.is_set, self.plan.patience_s):
            return StopFacts(None)
        time.sleep(_SETTLE_S)
        return StopFacts(self.flag.received.name if self.flag.received else None, _image_error())


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _reduce_facts(plan: Plan, folder: Path, rank: int) -> ReduceFacts:
    """Sum over all tasks, and keep what NCCL logs about its transport."""
    if importlib.util.find_spec("torch") is None:
        return ReduceFacts(torch=None)
    log = folder / f"nccl-{rank}.log"
    os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,GRAPH", NCCL_DEBUG_FILE=str(log))
    from bbu.doctor.collective import reduce_facts

    facts = reduce_facts(plan.megabytes, plan.gpus > 0, plan.patience_s)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    transport = [line for line in lines if " via " in line or "NET/" in line or "network" in line]
    return replace(facts, log="\n".join(transport))


def _node_facts(plan: Plan, environ: Mapping[str, str]) -> NodeFacts:
    """Look at this node, before any other task is needed."""
    temporary = tempfile.gettempdir()
    return NodeFacts(
        name=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        job_id=environ.get("SLURM_JOB_ID"),
        step_id=environ.get("SLURM_STEP_ID"),
        in_container=bool(environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER")),
        user_site=bool(site.ENABLE_USER_SITE),
        code=str(Path(__file__).resolve().parents[2]),
        current_folder=os.path.realpath("."),
        cpus=len(os.sched_getaffinity(0)),
        memory_mb=_memory_mb(Path("/proc/meminfo").read_text()),
        memory_limit_mb=_memory_limit_mb(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")),
        shm_free=shutil.disk_usage("/dev/shm").free,
        temporary_folder=temporary,
        temporary_free=shutil.disk_usage(temporary).free,
        binds=[_bind_facts(bind) for bind in plan.binds],
        driver=_driver_version(),
        interfaces=_interfaces(),
        host_address=_host_address(),
    )


def _memory_mb(meminfo: str) -> int:
    total = re.search(r"MemTotal:\s+(\d+) kB", meminfo)
    return int(total[1]) // 1024 if total else 0


def _memory_limit_mb(cgroup: str, root: Path) -> int | None:
    """The narrowest limit on this process's control groups (version 2); None where none is set or visible."""
    group = re.search(r"(?m)^0::/(.*)$", cgroup)
    folders = [root / group[1], *(root / group[1]).parents] if group else []
    files = [folder / "memory.max" for folder in folders if folder.is_relative_to(root)]
    limits = [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(limits) >> 20 if limits else None


def _bind_facts(bind: str) -> BindFacts:
    source, *rest = bind.split(":")
    inside = rest[0] if rest and rest[0] else source
    return BindFacts(bind, readable=os.access(inside, os.R_OK | os.X_OK), writable=os.access(inside, os.W_OK))


def _driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    version = re.search(r"(\d{3,}\.\d+(?:\.\d+)?)", path.read_text()) if path.exists() else None
    return version[1] if version else None


def _interfaces() -> dict[str, str]:
    return {name: _interface_address(name) for _, name in socket.if_nameindex()}


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        try:
            answer = fcntl.ioctl(handle.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:  # down, or IPv6 alone
            return ""
    return socket.inet_ntoa(answer[20:24])


def _host_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def clock_ahead_s(folder: Path) -> float:
    """Return how far this machine's clock is ahead of the filesystem's, in seconds; 0 where they cannot be told apart.

    The filesystem stamps a file between two readings of the own clock.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        before = time.time()
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        after, written = time.time(), os.fstat(file.fileno()).st_mtime
    return max(0.0, before - written) or min(0.0, after - written)


def _durable_write_s(folder: Path) -> float:
    """Seconds to write 4 MB so that file and name survive a crash."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(_WRITE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        sync_folder(folder)
    return time.monotonic() - start


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # Lustre without the flock option
            return False
    return True


def _image_error() -> str | None:
    """Why Python's own files cannot be read any more; None if they can."""
    try:
        for name in _LATE_MODULES:
            importlib.import_module(name)
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            path.read_bytes()
    except (OSError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return None
