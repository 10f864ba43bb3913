"""What `bbu.doctor` looks at on a compute node, from inside the container: one process per task, each with a report.

The tasks share one folder. A report is written anew after every stage, so that whoever waits outside can tell
where a task that hangs or dies has got to. All waiting is bounded.
"""

from __future__ import annotations

import fcntl
import importlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import PREEMPTED_EXIT_CODE, JobError
from bbu.run.files import sync_folder, write_atomic

PLAN = "plan.json"
FILES, ALL_REDUCE, SIGNAL, DONE = "files", "all-reduce", "signal", "done"
"""What a task is at. SIGNAL: it waits for one; DONE: it got it, and could go on."""
ROUNDS = 3
POLL_S = 0.005
LEAVING_S = 0.5
"""For the others to leave their containers."""
WRITE_BYTES = 4 << 20
LATE_MODULES = ("sqlite3", "decimal", "xml.dom.minidom", "wave", "imaplib", "plistlib")
"""Part of Python, used by nothing here: they must still be read from the image after a signal."""
SIOCGIFADDR = 0x8915

Facts = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the tasks are told by the file `plan.json` in their folder. patience_s bounds each wait for the others."""

    token: str
    gpus: int
    network_interface: str | None
    binds: list[str]
    megabytes: int
    patience_s: float

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / PLAN).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        write_atomic(folder / PLAN, json.dumps(asdict(self)))


@dataclass(frozen=True)
class Stops:
    """The stop signal as the trainer sees it: the name of the one that came, or None."""

    received: Callable[[], str | None]


class Probe:
    """One task's look at its node."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.facts: Facts = {"rank": self.rank, "world": self.world}

    def tell(self, stage: str, facts: Mapping[str, Any]) -> None:
        self.facts |= {"stage": stage, **facts}
        write_atomic(report_path(self.folder, self.rank), json.dumps(self.facts))

    def meet(self, name: str) -> bool:
        """Wait until all tasks are here; False if some did not come in time."""
        (self.folder / f"at-{name}-{self.rank}").touch()
        waiting = [self.folder / f"at-{name}-{rank}" for rank in range(self.world)]
        return wait_until(lambda: all(path.exists() for path in waiting), self.plan.patience_s)

    def files(self) -> Facts:
        """The shared filesystem, judged by what checkpoints, leases and the eval ledger need of it."""
        facts: Facts = {"token": self.plan.token, "met": self.meet("files")}
        if facts["met"]:
            facts |= self.race() | self.replaced()
        return facts | storage_facts(self.folder)

    def race(self) -> Facts:
        """All tasks want one name: link(2) must give it to one of them."""
        draft = self.folder / f"draft-{self.rank}"
        draft.write_text(str(self.rank))
        try:
            os.link(draft, self.folder / "winner")
        except FileExistsError:
            return {"won": False}
        except OSError as error:  # a filesystem without hard links is one of the things looked for
            return {"won": False, "link_error": str(error)}
        return {"won": True}

    def replaced(self) -> Facts:
        """Rank 0 replaces a file again and again, and the others answer what they see; times are rank 0's alone."""
        if self.world == 1:
            return {}
        if self.rank == 0:
            return {"visible_s": max(self.ask(number) for number in range(1, ROUNDS + 1))}
        broken: list[str] = []
        for number in range(1, ROUNDS + 1):
            if not wait_until(lambda number=number: self.sees("ping", number, broken), self.plan.patience_s):
                broken.append(f"round {number} was not seen")
                break
            write_atomic(self.folder / f"pong-{self.rank}", json.dumps({"round": number}))
        return {"broken_reads": broken}

    def ask(self, number: int) -> float:
        """Seconds until all others have seen a new file, and rank 0 has seen their answers."""
        write_atomic(self.folder / "ping", json.dumps({"round": number, "filler": "x" * 4096}))
        start, broken = time.monotonic(), []
        names = [f"pong-{rank}" for rank in range(1, self.world)]
        wait_until(lambda: all(self.sees(name, number, broken) for name in names), self.plan.patience_s)
        return time.monotonic() - start

    def sees(self, name: str, number: int, broken: list[str]) -> bool:
        """Whether the file says this round or a later one. A replaced file must never be missing or half there."""
        try:
            return json.loads((self.folder / name).read_text())["round"] >= number
        except FileNotFoundError:
            if number > 1:
                broken.append(f"{name} was missing while it was replaced")
        except (OSError, ValueError) as error:  # a stale handle, a part of the text
            broken.append(f"{name}: {error}")
        return False

    def signalled(self, stops: Stops) -> Facts:
        """Wait for the stop signal; then Python must go on, and the image must still be there."""
        if not wait_until(lambda: stops.received() is not None, self.plan.patience_s):
            return {"signal": None}
        time.sleep(0.5)  # a server of the image that the signal reached is gone by now
        return {"signal": stops.received(), "image_error": image_error()}


def run_probe(folder: Path, stops: Stops, reduce: Callable[[Plan, Path], Facts]) -> int:
    """Look at the node and report. Returns 1 if no signal came, else rank 0 that of a job that saved its state.

    `reduce` sums a tensor over all tasks and looks at the GPUs: it needs torch, which this room has not.
    """
    plan = Plan.read(folder)
    if "RANK" not in os.environ:
        raise JobError("RANK is not set: the container hides the variables of slurm/task.sh")
    probe = Probe(folder, plan)
    probe.tell(FILES, node_facts(plan, os.environ))
    probe.tell(ALL_REDUCE, probe.files())
    probe.tell(SIGNAL, {"reduce": reduce(plan, folder)})
    ended = probe.signalled(stops)
    probe.tell(DONE if ended["signal"] else SIGNAL, ended)
    if not ended["signal"]:
        return 1
    # Whoever leaves with a code first ends the others (srun's --kill-on-bad-exit), so that is one task, at the end.
    if probe.rank:
        (folder / f"at-end-{probe.rank}").touch()
        return 0
    probe.meet("end")
    time.sleep(LEAVING_S)
    return PREEMPTED_EXIT_CODE


def report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def node_facts(plan: Plan, environ: Mapping[str, str]) -> Facts:
    """What stands on this node, before any other task is needed."""
    return {
        "node": environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "job": environ.get("SLURM_JOB_ID"),
        "step": environ.get("SLURM_STEP_ID"),
        "restarts": environ.get("SLURM_RESTART_COUNT"),
        "in_container": bool(environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER")),
        "user_site": bool(site.ENABLE_USER_SITE),
        "code": str(Path(__file__).resolve().parents[2]),
        "cwd": os.path.realpath("."),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": memory_mb(Path("/proc/meminfo").read_text()),
        "limit_mb": memory_limit_mb(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")),
        "shm_free": shutil.disk_usage("/dev/shm").free,
        "temporary": temporary_facts(),
        "binds": [bind_facts(bind) for bind in plan.binds],
        "driver": driver_version(),
        "interfaces": interfaces(),
        "own_address": own_address(),
    }


def memory_mb(meminfo: str) -> int:
    total = re.search(r"MemTotal:\s+(\d+) kB", meminfo)
    return int(total[1]) // 1024 if total else 0


def memory_limit_mb(cgroup: str, root: Path) -> int | None:
    """The narrowest limit on this process's control groups (version 2), None where there is none or none is told."""
    own = re.search(r"(?m)^0::/(.*)$", cgroup)
    folders = [root / own[1], *(root / own[1]).parents] if own else []
    files = [folder / "memory.max" for folder in folders if folder.is_relative_to(root)]
    limits = [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(limits) >> 20 if limits else None


def temporary_facts() -> Facts:
    """Where temporary files go (`scratch` of the profile sets it), and its free space."""
    folder = tempfile.gettempdir()
    return {"folder": folder, "free": shutil.disk_usage(folder).free}


def bind_facts(bind: str) -> Facts:
    """`/from`, `/from:/to`, `/from:/to:ro`: how it looks inside."""
    source, *rest = bind.split(":")
    inside = rest[0] if rest and rest[0] else source
    return {"bind": bind, "readable": os.access(inside, os.R_OK | os.X_OK), "writable": os.access(inside, os.W_OK)}


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"(\d{3,}\.\d+(?:\.\d+)?)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def interfaces() -> dict[str, str]:
    """The network interfaces and their IPv4 addresses; empty where one has none."""
    return {name: address_of(name) for _, name in socket.if_nameindex()}


def address_of(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:  # down, or IPv6 alone
            return ""
    return socket.inet_ntoa(answer[20:24])


def own_address() -> str:
    """What this host's name means to itself: where gloo listens if no interface is stated."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def storage_facts(folder: Path) -> Facts:
    """The shared folder as this node sees it: clock, durable writes, locks, space."""
    return {
        "clock_ahead_s": clock_ahead(folder),
        "fsync_s": durable_write_s(folder),
        "flock": locks(folder),
        "free": shutil.disk_usage(folder).free,
    }


def clock_ahead(folder: Path) -> float:
    """How far this machine's clock is ahead of the filesystem's own, in seconds; 0 where no difference can be told."""
    with tempfile.TemporaryFile(dir=folder) as file:
        before = time.time()
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        after, written = time.time(), os.fstat(file.fileno()).st_mtime
    return max(0.0, before - written) or min(0.0, after - written)


def durable_write_s(folder: Path) -> float:
    """Seconds to write 4 MB so that they outlive a crash, file and name."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(WRITE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        sync_folder(folder)
    return time.monotonic() - start


def locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # Lustre without the flock option
            return False
    return True


def image_error() -> str | None:
    """Why Python's own files cannot be read any more; None if they can."""
    try:
        for name in LATE_MODULES:
            importlib.import_module(name)
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            path.read_bytes()
    except (OSError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return None
