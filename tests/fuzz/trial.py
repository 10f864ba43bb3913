"""Tries readers on hostile input and counts what comes of it, under limits of time and memory."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bbu.errors import BBUError
from tests.fuzz.readers import Reader

CPU_SECONDS = 5.0
"""A reader that computes longer hangs."""
WAIT_SECONDS = 60.0
"""A reader that takes longer waits for something; far more than CPU_SECONDS, because other processes compute too."""
MEMORY_BYTES = 1 << 30
"""Address space that reading may take beyond what the process has already."""


class _TooLongError(BaseException):
    """The time is up. Not an Exception, so that no reader takes it for an error of its input."""


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    reader: str
    """The reader's name."""
    records: int = 0
    """Inputs tried."""
    refused: int = 0
    """Inputs that ended in a typed error."""
    slowest: float = 0.0
    """CPU seconds of the slowest input."""
    hangs: int = 0
    """Inputs that took more than CPU_SECONDS, or waited for WAIT_SECONDS."""
    tracebacks: int = 0
    """Inputs that ended in any other exception."""
    examples: list[str] = field(default_factory=list)
    """The seeds of the first bad ones, with what happened."""

    @property
    def accepted(self) -> int:
        return self.records - self.refused - self.hangs - self.tracebacks


def try_reader(reader: Reader, records: int, seed: int) -> Tally:
    """Try a reader on inputs number 0 to `records` - 1; each depends on the seed and its number alone."""
    tally = Tally(reader.name)
    with _quiet(), _limited_memory():
        for number in range(records):
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            try:
                _try_once(reader, folder, f"{seed}/{reader.name}/{number}", tally)
            finally:
                shutil.rmtree(folder)
    return tally


def _try_once(reader: Reader, folder: Path, seed: str, tally: Tally) -> None:
    content = reader.make(random.Random(seed))
    tally.records += 1
    begin = time.process_time()
    try:
        with _limited_time():
            reader.read(folder, content)
    except BBUError as error:
        tally.refused += reader.may_refuse
        if not reader.may_refuse:
            _note_traceback(tally, seed, error)
        elif not str(error).strip():
            _note_traceback(tally, seed, ValueError("an error without a word"))
    except _TooLongError:
        tally.hangs += 1
        tally.examples.append(f"{seed}: hangs")
    except (Exception, SystemExit) as error:  # the very thing that is looked for: each kind of it is a finding
        _note_traceback(tally, seed, error)
    tally.slowest = max(tally.slowest, time.process_time() - begin)


def _note_traceback(tally: Tally, seed: str, error: BaseException) -> None:
    tally.tracebacks += 1
    place = traceback.extract_tb(error.__traceback__)[-1:] or ["?"]
    tally.examples.append(f"{seed}: {type(error).__name__}: {str(error)[:200]} at {place[0]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what readers log and print, such as argparse's usage, off the screen."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let no input take more than MEMORY_BYTES: it ends in a MemoryError, which is a finding."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Raise _TooLongError in the block once it has computed, or waited, for too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    previous = signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, *previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
