"""The host's half of a task: what submitit starts on a node, once per rank, and which starts the container.

It stays outside the container because `scontrol` is often missing inside, and because submitit's pickles
should not cross Python environments.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bbu.errors import PREEMPTED_EXIT_CODE, STOP_SIGNALS, JobError
from bbu.jobs.container import container_command
from bbu.jobs.queue import requeue, restart_count, tell

FIRST_PORT, PORTS = 20_000, 10_000  # ends at 29,999: Linux hands out its ephemeral ports from 32,768 on
RESTART_STRIDE = 7_919  # a prime far from 0 and PORTS, so that a restart leaves a port in TIME_WAIT behind


def expand_nodes(node_list: str) -> list[str]:
    """The host names of a Slurm node list, in order: `n[1-2,05],m3` is n1, n2, n05, m3.

    Several bracketed groups in one name multiply out (`r[1-2]n[1-2]`), widths are kept (`n[08-10]`).
    Raises JobError if it cannot be read.
    """
    names = [name for part in split_outside_brackets(node_list) for name in expand_name(part)]
    if not names or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise JobError(f"cannot read the node list {node_list!r}; expected a form such as n[1-2,5],m3")
    return names


def split_outside_brackets(text: str) -> list[str]:
    return re.findall(r"(?:[^,\[]|\[[^\]]*\]|\[)+", text)


def expand_name(name: str) -> Iterator[str]:
    match = re.search(r"\[([\d,-]+)\]", name)
    if not match:
        yield name
        return
    for number in numbers(match[1]):
        yield from expand_name(name[: match.start()] + number + name[match.end() :])


def numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise JobError(f"cannot read the node range {ranges!r}; expected a form such as 1-2,5")
        first, last = match[1], match[2] or match[1]
        yield from (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))


def master_port(job_id: int, restarts: int) -> int:
    """The port of rank 0: the same on every rank, another one for the next job and for a restart."""
    return FIRST_PORT + (job_id + RESTART_STRIDE * restarts) % PORTS


def distributed_env(environ: Mapping[str, str], master_suffix: str = "") -> dict[str, str]:
    """What torch.distributed's `env://` wants, from Slurm's variables or those of submitit's local executor.

    Returns RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Raises JobError outside of both.
    """
    if "SLURM_PROCID" in environ:
        return slurm_env(environ, master_suffix)
    if "SUBMITIT_LOCAL_GLOBALID" in environ:
        return local_env(environ)
    raise JobError("neither SLURM_PROCID nor SUBMITIT_LOCAL_GLOBALID is set; a task is started by srun or submitit")


def slurm_env(environ: Mapping[str, str], master_suffix: str) -> dict[str, str]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": expand_nodes(nodes)[0] + master_suffix,
        "MASTER_PORT": str(master_port(int(environ["SLURM_JOB_ID"]), restart_count(environ))),
    }


def local_env(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": environ["SUBMITIT_LOCAL_LOCALID"],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master_port(int(environ["SUBMITIT_LOCAL_JOB_ID"]), 0)),
    }


@dataclass(frozen=True)
class ContainerTask:
    """One rank: a callable for submitit that runs `python COMMAND…` in the container and minds its end.

    `environment` goes to the child on top of the task's own and of `distributed_env`. `grace_seconds` is how
    long a child of the local executor may take to stop after TERM or INT.
    """

    command: tuple[str, ...]
    home: Path
    image: str | None
    environment: Mapping[str, str]
    max_requeues: int
    master_suffix: str
    grace_seconds: int

    def __call__(self) -> int:
        """Returns the child's exit code under the local executor, where submitit hands it back.

        Under Slurm srun must see it: raises SystemExit with any code but 0. A rank whose child saved and
        asked to go on (75) returns, and rank 0 requeues the job; SystemExit(75) if that was refused.
        """
        environment = {**os.environ, **distributed_env(os.environ, self.master_suffix), **self.environment}
        argv = container_command(self.home, self.image, self.command)
        if "SLURM_PROCID" not in os.environ:
            return run_local(argv, environment, self.grace_seconds)
        code = run_under_slurm(argv, environment)
        if code == PREEMPTED_EXIT_CODE and self.goes_on(environment):
            return code
        if code:
            raise SystemExit(code)
        return 0

    def goes_on(self, environment: Mapping[str, str]) -> bool:
        return environment["RANK"] != "0" or requeue(os.environ, self.max_requeues)


def run_under_slurm(argv: list[str], environment: Mapping[str, str]) -> int:
    """Run the child, deaf to the stop signals: Slurm sends them to every process, so the child has its own.

    submitit has installed handlers by now. They must go: its handler calls `checkpoint()` from inside our
    wait for the child, and would requeue the job before the child has saved. Ignoring the signals instead
    would be inherited by the child.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, let_pass)
    return exit_code(subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL).wait())


def let_pass(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal is the child's."""


def run_local(argv: list[str], environment: Mapping[str, str], grace_seconds: int) -> int:
    """Run the child in a process group of its own and hand stop signals on to it.

    It gets the whole group because slurm/container.sh does not forward. After TERM or INT it has
    `grace_seconds` to stop before it is killed.
    """
    pending: list[int] = []
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, lambda number, frame: pending.append(number))
    child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    forward_signals(child, grace_seconds)
    for number in pending:  # came while the child was being started
        signal.raise_signal(number)
    code = exit_code(child.wait())
    signal.alarm(0)
    if code == PREEMPTED_EXIT_CODE:
        tell("stopped with its state saved; there is no queue here: run the same command again to go on")
    return code


def forward_signals(child: subprocess.Popen[bytes], grace_seconds: int) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(grace_seconds)  # counted from the first: the asking may be repeated
        signal_group(child, signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (*STOP_SIGNALS, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, forward)


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(child.pid, number)


def exit_code(returncode: int) -> int:
    """A shell's notation: 128 + n for a child that signal n ended."""
    return 128 - returncode if returncode < 0 else returncode
