"""Typed errors with their exit codes, and how an entry ends.

An error message is one line for a person: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, TracebackType

PREEMPTED_EXIT_CODE = 75
"""The state is saved on disk: requeue the job. 75 is EX_TEMPFAIL of sysexits.h; no other error has this code."""
INTERRUPTED_EXIT_CODE = 130
"""As a shell reports a program that Ctrl-C ended: 128 + SIGINT."""
BROKEN_PIPE_EXIT_CODE = 141
"""As a shell reports a program whose reader has gone: 128 + SIGPIPE."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""The signals that request a task to save its state and exit with PREEMPTED_EXIT_CODE."""

_PACKAGE = os.path.dirname(__file__)
"""This package's folder. A checkout may have the same name, so a path is this project's by its beginning alone."""
_BASE_PACKAGES = ("yaml", "PIL", "simplejpeg", "pyvips", "numpy", "submitit", "json_repair", "tabulate")
"""What the project's base installs; all other packages come with its extra `train`."""
_MAX_WORD = 100
"""Letters of a word that are compared with valid words: the time grows with their square."""
_MOST_LETTERS = 500
"""Of a path in a message: of a longer one its end."""
_ESCAPE = "bbu-escape"
"""Name of our error handler in `codecs`."""
_MAKE_ROOM = "remove old runs, or choose another filesystem (output_root, data_root, TMPDIR)"
_NO_RIGHT = "check its owner and mode, or choose another folder"
_ADVICE = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "a part of this path is a file; check the name",
    errno.EISDIR: "this is a folder; name a file",
    errno.EEXIST: "it is in the way; remove it, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "raise the limit (ulimit -n), or lower dataloader_num_workers",
    errno.ENFILE: "this machine has too many open files in all; try again later",
    errno.EAGAIN: "too many processes; raise the limit (ulimit -u)",
    errno.ENOMEM: "request more memory for the job",
    errno.ESTALE: "the file server has replaced it; repeat the command from a folder entered anew (cd)",
    errno.EIO: "the disk or the file server fails; try again, then ask its administrators",
}
"""What to do about an error of the operating system."""


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


def nearest_valid(word: object, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the valid word that is nearest to `word`, or "" where none is near.

    Hyphens and capitals make no difference: `LLM-LR` is near `llm_lr`.
    """
    spelled = {str(item).lower(): item for item in valid}
    near = difflib.get_close_matches(str(word)[:_MAX_WORD].lower().replace("-", "_"), list(spelled), n=1, cutoff=0.5)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""


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
    _flush_output()
    os._exit(code)


def prepare_entry() -> None:
    """Make what goes wrong before `run_entry`, such as a package that cannot be imported, one line too."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the person may have another Python than the project asks for
        sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]} ({sys.executable})")
    sys.excepthook = _report_uncaught


def run_entry(main: Callable[[], int | None], exit_process: Callable[[int], object] = sys.exit) -> None:
    """Run an entry point and end the process with its exit code.

    A typed error, or one of the machine (`error_lines`), is reported in `error:` lines without a stack trace, which
    would not help with a full disk. With log_level DEBUG the stack trace is logged.

    Args:
        main: returns the exit code; None is 0.
        exit_process: ends the process with a code.
    """
    _make_output_encodable()
    try:
        code = _exit_code_of(main)
        _flush_output()
    except BrokenPipeError:  # the reader of our output has gone: `python -m bbu.status | head -1`
        code = BROKEN_PIPE_EXIT_CODE
    except OSError as error:
        _print_errors(error_lines(error) or [])
        code = 1
    _discard_unwritable_output()
    exit_process(code)


def error_lines(error: BaseException) -> list[str] | None:
    """Say in lines for a person what went wrong.

    Returns:
        The lines, for a typed error or one of the machine: a file, a missing package, memory. None for any other,
        which is a defect of ours, whose stack trace is needed.
    """
    if isinstance(error, BBUError):
        return str(error).splitlines()
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"]
    if (os_error := error if isinstance(error, OSError) else _os_error_of_library(error)) is not None:
        return [_describe_os_error(os_error)]
    if isinstance(error, ImportError):
        return [_describe_import_error(error)]
    if isinstance(error, UnicodeEncodeError):
        text = f"{error.encoding}, the encoding of this terminal or locale, cannot hold {error.object!r}"
        return [f"{text}; export LC_ALL=C.UTF-8"]
    if isinstance(error, MemoryError):
        return ["out of memory; request more for the job, or lower convert_processes or dataloader_num_workers"]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        advice = "lower max_total_length, per_device_train_batch_size or generation_batch_size"
        return [f"{_one_line(error).partition('. ')[0]}; {advice}, or set gradient_checkpointing to true"]
    return None


def _exit_code_of(main: Callable[[], int | None]) -> int:
    """Call `main` and return its exit code, with errors reported."""
    try:
        return main() or 0
    except SystemExit as error:  # of argparse
        if isinstance(error.code, str):
            _print_errors([error.code])
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        lines = error_lines(error)
        if lines is None:
            raise
        logging.getLogger("bbu").debug("where the error arose", exc_info=error)
        _print_errors(lines)
        return INTERRUPTED_EXIT_CODE if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error that nothing has handled (a `sys.excepthook`)."""
    lines = error_lines(error)
    if lines is None:
        sys.__excepthook__(kind, error, trace)
    else:
        _print_errors(lines)


def _print_errors(lines: Sequence[str]) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more: nothing is left to do
        for line in lines:
            print(f"error: {line}", file=sys.stderr, flush=True)


def _describe_os_error(error: OSError) -> str:
    """`PATH: no space left on device; what to do`. Without a path, the function that met the error is named."""
    if error.errno is None:  # a library's, with a text of its own
        return f"{type(error).__name__}: {_one_line(error)}"
    name = error.filename2 or error.filename  # of a rename, the place that it was to go to
    if name is None and isinstance(error, FileNotFoundError):  # of os.getcwd()
        return "the current folder is gone; go to another one (cd)"
    where = os.fsdecode(name)[-_MOST_LETTERS:] if isinstance(name, str | bytes) else _place(error)
    advice = _ADVICE.get(error.errno, "")
    return f"{where}: {(error.strerror or str(error)).lower()}" + (f"; {advice}" if advice else "")


def _os_error_of_library(error: BaseException) -> OSError | None:
    """The error of the operating system that safetensors and torch report in a text when they write a file."""
    text, number = str(error), None
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", text)):
        number = int(match[1])
    elif isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in text or "inline_container.cc" in text):
        number = errno.ENOSPC  # torch does not say which; it is this one nearly always
    return None if number is None else OSError(number, os.strerror(number)).with_traceback(error.__traceback__)


def _place(error: BaseException) -> str:
    """The function of this project that met an error, with a path that it handles: `t.md (write in bbu/files.py)`."""
    frame, trace = None, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(_PACKAGE + os.sep) and name != __file__:
            frame = trace.tb_frame
        trace = trace.tb_next
    if frame is None:
        return "a file or connection"
    function = f"{frame.f_code.co_name} in {os.path.relpath(frame.f_code.co_filename, os.path.dirname(_PACKAGE))}"
    paths = [value for value in map(_path_of, frame.f_locals.values()) if value]
    return f"{paths[0]} ({function})" if paths else function


def _path_of(value: object) -> str | None:
    if isinstance(value, io.IOBase):
        value = getattr(value, "name", None)
        return value if isinstance(value, str) else None
    return os.fsdecode(value) if isinstance(value, os.PathLike) else None


def _describe_import_error(error: ImportError) -> str:
    name = (error.name or "").partition(".")[0]
    if name == "bbu":
        return f"{_one_line(error)}; this checkout is incomplete, or another one comes first in PYTHONPATH"
    if isinstance(error, ModuleNotFoundError) and name:
        extra = "" if name in _BASE_PACKAGES else "[train]"
        return f"the Python package {name} is not installed in {sys.executable}; pip install -e '.{extra}'"
    text = f"a Python package cannot be loaded: {_one_line(error)}"
    return f"{text}; pip install -e '.[train]' in {sys.executable}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _make_output_encodable() -> None:
    """Write characters that an output's encoding lacks as JSON's escapes, instead of failing at the first of them."""
    codecs.register_error(_ESCAPE, _escape_for_json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)


def _escape_for_json(error: UnicodeError) -> tuple[str, int]:
    """Write what cannot be encoded as `\\uXXXX` (an error handler of `codecs`)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


def _flush_output() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller has closed it
        try:
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"the output ({stream.name})") from error


def _discard_unwritable_output() -> None:
    """Point an output that cannot be written at /dev/null: the interpreter would complain when it ends."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
