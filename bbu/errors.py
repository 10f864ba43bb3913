"""Typed errors and the exit codes they carry: the one place where a failure gets its number.

An error message is one line for a person: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

PREEMPTED_EXIT_CODE = 75
"""Reserved (EX_TEMPFAIL): state is saved on disk, requeue me. Every other code passes through unchanged."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""The signals that ask a task to save its state and leave with PREEMPTED_EXIT_CODE."""


class BBUError(Exception):
    """Base of every error this project raises on purpose; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(BBUError):
    """A run config or cluster profile is refused. Carries every finding at once, one line each."""

    exit_code = 2

    def __init__(self, *findings: str) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class DataError(BBUError):
    """Input data (vendor files, JSONL records, images) is refused."""

    exit_code = 3


class ModelError(BBUError):
    """A model folder is missing or does not fit this project."""

    exit_code = 4


class CheckpointError(BBUError):
    """A checkpoint or run folder is incomplete, corrupt or held by somebody else."""

    exit_code = 5


class NonFiniteError(BBUError):
    """A loss or gradient is NaN or infinite."""

    exit_code = 6


class JobError(BBUError):
    """A job cannot be described, submitted or launched."""

    exit_code = 7


class Stopped(BaseException):
    """A stop signal came: the job is about to end. Not an Exception, so that no handler on the way swallows it."""


def raise_on_stop_signals() -> None:
    """Make a stop signal raise `Stopped`, so that the work ends as by an error and gives back what it holds.

    For a command that can stop anywhere; training stops between two steps instead (`bbu.training.preemption`).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def leave_at_once(code: int) -> None:
    """For `run_entry`: end without tearing down, once all is written. A C++ thread of gloo or DeepSpeed now and then
    aborts an interpreter that is done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_entry(main: Callable[[], int | None], leave: Callable[[int], object] = sys.exit) -> None:
    """Run an entry point and leave the process: 0 or main's code, or one `error:` line per finding.

    A file that cannot be read or written is told in the same way: no stack of ours helps with a full disk.
    """
    try:
        code = main()
    except BBUError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        code = 1
    leave(code or 0)
