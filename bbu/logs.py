"""What a program reports: the logging set-up of the entries, lines to the person at the terminal, durations."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bbu.errors import ConfigError

_SUMMARY = ("bbu.training", "bbu.train", "bbu.eval", "bbu.convert", "bbu.infer")
"""Components that log at `log_level` even when `log_verbose` is off."""
_HANDLER_PREFIX = "bbu-"
"""Begins the names of our handlers, so that a second set-up replaces them and leaves others alone."""


class _LogFile(logging.FileHandler):
    """A log file. One that cannot be written, on a full disk, is reported once and not for each of its lines."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_failed:
            self.has_failed = True
            print_notice(
                "bbu", f"{self.baseFilename} lacks lines from here on: {(error.strerror or str(error)).lower()}"
            )


def set_up_logging(level: str, verbose: bool, rank: int = 0, folder: Path | None = None) -> None:
    """Send all logs to stderr and, given a folder, also to `rank-{rank}.log` in it (appended).

    On stderr only rank 0 logs below WARNING; the files of the other ranks hold everything. A second call replaces
    the set-up of the first.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        verbose: log all components of bbu at `level`; else those of `_SUMMARY` only, and the others from WARNING on.
        rank: the process's rank.
        folder: where the file is written; None writes no file.
    """
    formatter = logging.Formatter(f"%(asctime)s %(levelname)-7s rank{rank} %(name)s: %(message)s")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.NOTSET if rank == 0 else logging.WARNING)
    handlers: dict[str, logging.Handler] = {"console": console}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers["file"] = _LogFile(folder / f"rank-{rank}.log", encoding="utf-8")
    _replace_handlers(handlers, formatter)
    _set_levels(level, verbose)
    logging.captureWarnings(True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # each rank would show its own


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank of a process from its environment: torch's RANK, else srun's SLURM_PROCID, else 0."""
    name = "RANK" if environ.get("RANK") else "SLURM_PROCID"
    text = environ.get(name) or "0"
    if not text.isdecimal():
        raise ConfigError(f"the variable {name} is {text!r}; it must be the number of a rank, or unset")
    return int(text)


def format_duration(seconds: float | None) -> str:
    """Write seconds as hours, minutes and seconds: 3725 becomes `1:02:05`; None becomes `?`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def print_notice(program: str, text: str) -> None:
    """Print one line for the person at the terminal: `program: text` on stderr, flushed.

    Args:
        program: the entry that speaks, as it is called: `bbu.submit`.
        text: the line, without a full stop or a line break at its end.
    """
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def _replace_handlers(handlers: Mapping[str, logging.Handler], formatter: logging.Formatter) -> None:
    root = logging.getLogger()
    for old in [h for h in root.handlers if (h.name or "").startswith(_HANDLER_PREFIX)]:
        root.removeHandler(old)
        old.close()
    for name, handler in handlers.items():
        handler.name = _HANDLER_PREFIX + name
        handler.setFormatter(formatter)
        root.addHandler(handler)


def _set_levels(level: str, verbose: bool) -> None:
    number = logging.getLevelNamesMapping()[level]
    logging.getLogger("bbu").setLevel(number if verbose else max(number, logging.WARNING))
    for name in _SUMMARY:
        logging.getLogger(name).setLevel(number)
