"""How far inference is, for the person at the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from tqdm import tqdm

from bbu.logs import print_notice

_SECONDS_BETWEEN_LINES = 30.0


class PhotoProgress(Protocol):
    """Counts photos."""

    def update(self) -> object:
        """Count one more photo."""
        ...


@contextmanager
def photo_progress(
    program: str, display: Literal["auto", "bar", "lines", "off"], total: int
) -> Iterator[PhotoProgress]:
    """Show the progress on stderr for a block.

    Args:
        program: the entry that speaks.
        display: the config's `progress`. auto is a bar on a terminal and lines elsewhere; on a terminal that shows the
            results too, they are the progress.
        total: number of photos.
    """
    if display == "bar" or (display == "auto" and sys.stderr.isatty() and not sys.stdout.isatty()):
        with tqdm(total=total, unit="photo", dynamic_ncols=True) as bar:
            yield bar
    else:
        is_silent = display == "off" or (display == "auto" and sys.stderr.isatty())
        yield _Lines(program, total, float("inf") if is_silent else _SECONDS_BETWEEN_LINES)


class _Lines:
    """A line now and then."""

    def __init__(self, program: str, total: int, interval_s: float) -> None:
        self._program, self._total, self._interval = program, total, interval_s
        self._count, self._last = 0, time.monotonic()

    def update(self) -> None:
        self._count += 1
        if time.monotonic() - self._last >= self._interval and self._count < self._total:
            self._last = time.monotonic()
            print_notice(self._program, f"{self._count} of {self._total} photos")
