"""Logging set-up, called by entries only: who may speak, how loudly, and where it is written."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

SUMMARY = ("bbu.training", "bbu.train", "bbu.eval", "bbu.convert", "bbu.infer")
"""Components heard at `log_level` even when `log_verbose` is off."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
HANDLER_PREFIX = "bbu-"


def set_up_logging(level: str, verbose: bool, rank: int = 0, folder: Path | None = None) -> None:
    """Route all logs to stderr and, given a folder, to `rank-{rank}.log` in it (appended).

    `level`: one of LEVELS. With `verbose` every component of bbu speaks at it, else SUMMARY only and the rest
    from WARNING on. On stderr ranks but 0 speak from WARNING on; their files hold everything. Calling again
    replaces the former set-up.
    """
    formatter = logging.Formatter(f"%(asctime)s %(levelname)-7s rank{rank} %(name)s: %(message)s")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.NOTSET if rank == 0 else logging.WARNING)
    handlers: dict[str, logging.Handler] = {"console": console}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers["file"] = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
    _replace_handlers(handlers, formatter)
    _set_levels(level, verbose)
    logging.captureWarnings(True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a tenth of a second, once for each rank


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank: torch's RANK, else srun's SLURM_PROCID, else 0."""
    return int(environ.get("RANK") or environ.get("SLURM_PROCID") or 0)


def duration(seconds: float | None) -> str:
    """3725 -> 1:02:05; an unknown one is a question mark."""
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
    for old in [h for h in root.handlers if (h.name or "").startswith(HANDLER_PREFIX)]:
        root.removeHandler(old)
        old.close()
    for name, handler in handlers.items():
        handler.name = HANDLER_PREFIX + name
        handler.setFormatter(formatter)
        root.addHandler(handler)


def _set_levels(level: str, verbose: bool) -> None:
    wanted = logging.getLevelNamesMapping()[level]
    logging.getLogger("bbu").setLevel(wanted if verbose else max(wanted, logging.WARNING))
    for name in SUMMARY:
        logging.getLogger(name).setLevel(wanted)
