"""Submit jobs and manage them; `train` where no command is named.

train | convert | eval | pipeline     submit a job; pipeline: all of them, in order
logs RUN | cancel RUN… | resume RUN   see what a run prints, cancel its jobs, resume its training

`python -m bbu.submit COMMAND --help` shows the options of a command. Those of train:
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial

from bbu.config.arguments import add_dry_run_argument
from bbu.errors import run_entry
from bbu.jobs.control import cancel_runs, training_to_resume, wait_for_log_files
from bbu.jobs.queue import clear_job_environment
from bbu.jobs.request import JOBS, add_request_arguments, check_options, request_from_arguments, split_job
from bbu.jobs.submission import submit_request
from bbu.logs import print_notice
from bbu.run.folder import RunFolder

_notify = partial(print_notice, "bbu.submit")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job, or run the tool that the first argument names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    clear_job_environment(os.environ)
    if argv and argv[0] in _TOOLS:
        return _TOOLS[argv[0]](argv[1:])
    job, words = split_job(argv)
    arguments = _parser(job, is_named=len(words) < len(argv)).parse_intermixed_args(words)
    check_options(arguments)
    request = request_from_arguments(arguments)
    return submit_request(request, _notify, arguments.dry_run, is_cluster_named=arguments.cluster is not None)


def _parser(job: str, is_named: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bbu.submit {job}" if is_named else "python -m bbu.submit",
        description=JOBS[job] if is_named else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_request_arguments(parser, job)
    add_dry_run_argument(parser)
    return parser


def _tool_parser(name: str, description: str, runs: str | int = 1) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bbu.submit {name}", description=description)
    parser.add_argument("runs", nargs=runs, metavar="RUN", help="name of a run, or its folder")
    return parser


def _show_logs(argv: Sequence[str]) -> int:
    parser = _tool_parser("logs", "Show what a run's newest job prints.")
    parser.add_argument("-f", "--follow", action="store_true", help="show new lines as they come; Ctrl-C ends it")
    parser.add_argument("--job", metavar="NAME", help="train, convert, merge, eval, eval-schedule … (the newest)")
    parser.add_argument("--rank", default="0", help="of which task: a number, or all (0)")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="how many lines to begin with (50)")
    arguments = parser.parse_args(argv)
    run = RunFolder.existing(arguments.runs[0])
    files = wait_for_log_files(run, arguments.job, arguments.rank, arguments.follow, _notify)
    sys.stdout.flush()
    follow = ["-F"] if arguments.follow else []
    os.execvp("tail", ["tail", "-n", str(arguments.lines), *follow, "--", *files])


def _cancel(argv: Sequence[str]) -> int:
    parser = _tool_parser("cancel", "Cancel all jobs and scheduled evals of runs; what is saved stays.", runs="+")
    runs = [RunFolder.existing(run) for run in parser.parse_args(argv).runs]
    for run, lines in cancel_runs(runs).items():
        for line in lines or ["nothing to cancel"]:
            _notify(f"{run.root.name}: {line}")
    return 0


def _resume(argv: Sequence[str]) -> int:
    parser = _tool_parser("resume", "Submit a run's training again, with its settings, from its last checkpoint.")
    add_dry_run_argument(parser)
    arguments = parser.parse_args(argv)
    request, folder = training_to_resume(RunFolder.existing(arguments.runs[0]))
    os.chdir(folder)  # paths in configs are relative to it
    command = [*request.resume_command(), *(["--dry-run"] if arguments.dry_run else [])]
    _notify(f"in {folder}: python -m bbu.submit {shlex.join(command)}")
    return submit_request(request, _notify, arguments.dry_run)


_TOOLS: dict[str, Callable[[Sequence[str]], int]] = {"logs": _show_logs, "cancel": _cancel, "resume": _resume}


if __name__ == "__main__":
    run_entry(main)
