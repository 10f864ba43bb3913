"""Typed errors with their exit codes, and how an entry ends.

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
"""The state is saved on disk: requeue the job. 75 is EX_TEMPFAIL of sysexits.h; no other error has this code."""
INTERRUPTED_EXIT_CODE = 130
"""As a shell reports a program that Ctrl-C ended: 128 + SIGINT."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""The signals that request a task to save its state and exit with PREEMPTED_EXIT_CODE."""


class BBUError(Exception):
    """Base of all errors that this project raises on purpose."""

    exit_code = 1
    """What the process returns."""


class ConfigError(BBUError):
    """A run config or cluster profile is refused. Carries all findings, one line each."""

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
    """A checkpoint or run folder is incomplete, corrupt or held by another process."""

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


def exit_without_teardown(code: int) -> None:
    """End the process without the interpreter's own teardown, once all output is written; an `exit_process`.

    A C++ thread of gloo or DeepSpeed sometimes aborts an interpreter that is being torn down, and with it the exit
    code of a run that is complete.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_entry(main: Callable[[], int | None], exit_process: Callable[[int], object] = sys.exit) -> None:
    """Run an entry point and end the process with its exit code.

    A typed error, or a file that cannot be read or written, is reported in `error:` lines without a stack trace,
    which would not help with a full disk.

    Args:
        main: returns the exit code; None is 0.
        exit_process: ends the process with a code.
    """
    try:
        code = main()
    except BBUError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:  # not about a file: a defect of ours, whose stack trace is needed
            raise
        print(f"error: {error.filename}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        code = 1
    exit_process(code or 0)
