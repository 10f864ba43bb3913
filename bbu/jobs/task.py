"""What submitit calls on a node, once for each rank: hands over to `slurm/task.sh`, the host half of every task.

Also the one line from a command back to its host half: how often its job may be requeued.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from bbu.errors import STOP_SIGNALS

logger = logging.getLogger(__name__)

_CAP_FILE = "BBU_REQUEUE_CAP"
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that the interpreter ignores; a program that takes its place would inherit that."""


@dataclass(frozen=True)
class ContainerTask:
    """One rank of a job: a callable that submitit pickles, and that runs `slurm/task.sh`."""

    argv: tuple[str, ...]
    """The command line of slurm/task.sh with the command that it runs."""
    environment: Mapping[str, str]
    """Variables on top of those that srun, or submitit's local executor, has set for the rank."""
    grace_seconds: int
    """Under the local executor: seconds that the command may take to stop after TERM or INT before it is killed."""

    def __call__(self) -> int:
        """Run the task: under Slurm in place of this process, under the local executor as its child.

        Returns:
            The exit code, under the local executor, which hands it to whoever waits for the job.
        """
        environment = {**os.environ, **self.environment}
        if "SLURM_PROCID" in os.environ:
            _replace_process(self.argv, environment)
        return _run_child(self.argv, environment, self.grace_seconds)


def state_max_requeues(max_requeues: int, environ: Mapping[str, str] = os.environ) -> None:
    """State how often the surrounding job may be requeued, for the case that this command leaves with exit code 75.

    `slurm/task.sh` reads it from a file that it names to rank 0. Elsewhere this does nothing.

    Args:
        max_requeues: the value in the config of what this command runs; the last call counts.
        environ: the environment of this process.
    """
    if path := environ.get(_CAP_FILE):
        try:
            with open(path, "r+", encoding="utf-8") as file:  # a file that is gone is not made anew
                file.truncate()
                file.write(f"{max_requeues}\n")
        except OSError as error:
            logger.warning("max_requeues cannot be stated in %s (%s); the job keeps the cap it began with", path, error)


def _replace_process(argv: tuple[str, ...], environment: Mapping[str, str]) -> NoReturn:
    """Become another program. Slurm signals every process of a step, and this one would be in the way.

    submitit's handlers go with it: on rank 0 they would requeue the job before the command has saved its state.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], argv, environment)


def _run_child(argv: tuple[str, ...], environment: Mapping[str, str], grace_seconds: int) -> int:
    """Run a program in a process group of its own and forward stop signals to the group; return its exit code.

    The local executor signals this process alone. The group gets the signals because neither slurm/task.sh nor
    slurm/container.sh forwards them.
    """
    early: list[int] = []
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, lambda number, frame: early.append(number))
    child = subprocess.Popen(argv, env=environment, process_group=0)
    _forward_signals(child, grace_seconds)
    for number in early:  # came while the child was being started
        signal.raise_signal(number)
    code = child.wait()
    signal.alarm(0)
    return 128 - code if code < 0 else code  # a shell's notation: 128 + n for a program that signal n ended


def _forward_signals(child: subprocess.Popen[bytes], grace_seconds: int) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        # The time counts from the first TERM or INT: whoever sends them repeats them.
        if number in (signal.SIGTERM, signal.SIGINT) and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(grace_seconds)
        _signal_group(child, signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (*STOP_SIGNALS, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, forward)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(child.pid, number)
