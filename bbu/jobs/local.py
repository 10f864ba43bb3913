"""Runs jobs on this machine by submitit's local executor: one after the other, their output shown as it comes.

submitit is imported inside the functions that submit, so that `--help` stays quick.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import Note, Submission, new_folder, python_command, tasks_of
from bbu.jobs.spec import JobSpec
from bbu.jobs.task import ContainerTask

_NO_LIMIT_MINUTES = 60 * 24 * 365
"""submitit's local executor requires a time limit; on one's own machine there is none."""
_POLL_SECONDS = 0.2


def run_here(
    spec: JobSpec, profile: ClusterProfile, checkout: Path, notify: Callable[[str], None], note: Note
) -> Submission:
    """Run each element of a job on this machine, one after the other, and show what its first rank prints.

    As in Slurm, an element that fails does not end the others.

    Args:
        spec: the job.
        profile: the site.
        checkout: the folder with the code.
        notify: receives lines for the person at the terminal.
        note: is called with the job before it begins.

    Returns:
        The job with the exit code of the first element that failed, or 0.
    """
    if spec.nodes > 1:
        notify(f"{spec.name}: {spec.nodes} nodes requested, there is one: {spec.tasks} tasks run on it")
    folder = new_folder(spec.name, profile)
    notify(f"{spec.name}: logs {folder}")
    note(Submission(spec.name, (), (folder,), None, 0, len(spec.commands)))
    first_bad = 0
    for index, task in enumerate(tasks_of(spec, profile, checkout)):
        if code := _run_element(task, spec, python_command(checkout), folder):
            element = f" element {index}" if spec.is_array else ""
            notify(f"{spec.name}:{element} failed with exit code {code}; every rank's output is in {folder}")
            first_bad = first_bad or code
    return Submission(spec.name, (), (folder,), first_bad)


def _run_element(task: ContainerTask, spec: JobSpec, python: str, folder: Path) -> int:
    from submitit import LocalExecutor

    executor = LocalExecutor(folder, python=python)
    executor.update_parameters(
        tasks_per_node=spec.tasks,
        gpus_per_node=spec.resources.gpus_per_node,
        timeout_min=_NO_LIMIT_MINUTES,
        stderr_to_stdout=True,
    )
    # The terminal sends Ctrl-C to all processes at once. The tasks inherit that it is ignored: wait() forwards it.
    with _signal_handlers({signal.SIGINT: signal.SIG_IGN}):
        job = executor.submit(task)
    with _signal_handlers({signal.SIGTERM: signal.default_int_handler}):  # `kill` ends the job as Ctrl-C does
        return _LocalRun(job).wait()


@contextlib.contextmanager
def _signal_handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install signal handlers for the duration of a `with` block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _LocalRun:
    """A running local job: shows rank 0's output, and stops all ranks when one of them fails."""

    def __init__(self, job: Any) -> None:
        self.job, self.shown_bytes, self.is_shown = job, 0, True
        self.ranks = [job.task(rank) for rank in range(job.num_tasks)]

    def wait(self) -> int:
        """Return the exit code of the rank that failed first, or 0.

        Ctrl-C, or an output that nobody reads any more, stops the job and is then raised again.
        """
        try:
            first_bad = self._follow()
        except (KeyboardInterrupt, OSError) as error:
            self.is_shown = isinstance(error, KeyboardInterrupt)
            self._follow(stopping=True)
            raise
        return first_bad or next(filter(None, (self._exit_code(rank) for rank in self.ranks)), 0)

    def _follow(self, stopping: bool = False) -> int:
        """Show the output until all ranks have ended; return the code of the first that failed meanwhile, or 0.

        The request to stop is repeated: submitit drops a TERM that comes before ContainerTask has begun.
        """
        first_bad = 0
        while not self.job.done():
            self._show_output()
            first_bad = first_bad or self._failure()
            if stopping or first_bad:
                self._stop()
            time.sleep(_POLL_SECONDS)
        self._show_output()
        return first_bad

    def _failure(self) -> int:
        ended = (rank for rank in self.ranks if rank.paths.result_pickle.exists())
        return next(filter(None, (self._exit_code(rank) for rank in ended)), 0)

    def _stop(self) -> None:
        """Ask all ranks to stop, as Slurm's --kill-on-bad-exit does; ContainerTask kills a rank that does not."""
        self.job._process.terminate()

    def _exit_code(self, rank: Any) -> int:
        """Return what ContainerTask returned; 1 for a rank that died before it could return.

        Read from the file, since submitit's `result()` waits until all ranks have ended.
        """
        from submitit.core.utils import pickle_load

        if not rank.paths.result_pickle.exists():
            return 1
        outcome, value = pickle_load(rank.paths.result_pickle)
        return value if outcome == "success" else 1

    def _show_output(self) -> None:
        """Print what rank 0 has printed since the last call, without submitit's own lines."""
        path = self.ranks[0].paths.stdout
        if not self.is_shown or not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.shown_bytes)
            text = file.read()
        # As long as the job runs, its last line may not be complete yet.
        complete = text if self.job.done() else text[: text.rfind(b"\n") + 1]
        self.shown_bytes += len(complete)
        lines = complete.decode(errors="replace").splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith("submitit ")))
        sys.stdout.flush()
