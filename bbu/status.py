"""Show the state of runs: `python -m bbu.status [RUN…]`; all runs of the current folder where none is named."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from bbu.config.arguments import add_json_argument
from bbu.errors import CheckpointError, error_lines, run_entry
from bbu.jobs.records import read_records
from bbu.jobs.run_status import view_runs
from bbu.jobs.status_report import comparison_rows, status_details, status_dict, status_row
from bbu.logs import print_notice
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder

_CLEAR_SCREEN = "\x1b[H\x1b[2J"
"""ANSI: cursor to the upper left corner, then erase everything."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the state of runs, once or until Ctrl-C."""
    arguments = _parser().parse_args(argv)
    if not arguments.watch:
        print(_report(arguments))
        return 0
    try:
        while True:
            text = _report(arguments)
            print(f"{_CLEAR_SCREEN if sys.stdout.isatty() else ''}{time.strftime('%X')}\n{text}", flush=True)
            time.sleep(arguments.interval)
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.status", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="names of runs, or their folders (all in this folder)")
    add("--watch", action="store_true", help="refresh the state until Ctrl-C")
    add("--interval", type=_seconds, default=5.0, metavar="SECONDS", help="time between two looks with --watch (5)")
    add_json_argument(parser)
    add("--compare", action="store_true", help="a table of the runs' differing settings and best scores instead")
    add("--out", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    return parser


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return float(text)


def _report(arguments: argparse.Namespace) -> str:
    """The text of one look at the runs; writes the table to --out too."""
    views = view_runs(_runs(arguments.runs))
    if arguments.json:
        return json.dumps([status_dict(view) for view in views], ensure_ascii=False, indent=1)
    rows = comparison_rows(views) if arguments.compare else [status_row(view) for view in views]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n")
    text = tabulate(rows, headers="keys", disable_numparse=True)
    return text if len(views) > 1 or arguments.compare else f"{text}\n\n{status_details(views[0])}"


def _runs(names: Sequence[str]) -> list[RunFolder]:
    """The named runs, else all of the current folder. Raises CheckpointError where there are none."""
    if names:
        return [RunFolder.existing(name) for name in names]
    runs = [run for run in RunFolder.all_in(Path()) if _can_be_read(run)]
    if not runs:
        raise CheckpointError("no output-* run folder here; name one, or go to the folder you submitted from")
    return runs


def _can_be_read(run: RunFolder) -> bool:
    """Whether a run's records can be read; says why not: one run must not hide all others."""
    try:
        read_records(run)
        run.config.is_file()
        return os.access(run.root, os.R_OK)
    except (CheckpointError, OSError) as error:
        print_notice("bbu.status", f"left out: {' '.join(error_lines(error) or [])}")
        return False


if __name__ == "__main__":
    run_entry(main)
