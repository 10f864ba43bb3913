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
from bbu.jobs.launch import Note, Submission, interpreter, new_folder, tasks_of
from bbu.jobs.spec import JobSpec
from bbu.jobs.task import ContainerTask

NO_LIMIT_MINUTES = 60 * 24 * 365  # submitit's local executor wants a time limit; a laptop has none


def run_here(spec: JobSpec, profile: ClusterProfile, home: Path, tell: Callable[[str], None], note: Note) -> Submission:
    """Run each element of a job on this machine, wait for it, and show what its first rank prints."""
    if spec.nodes > 1:
        tell(f"{spec.name}: {spec.nodes} nodes asked for, there is one: {spec.tasks} tasks run on it")
    folder = new_folder(spec.name, profile)
    tell(f"{spec.name}: logs {folder}")
    note(Submission(spec.name, (), (folder,), None, 0, len(spec.commands)))
    first_bad = 0
    for index, task in enumerate(tasks_of(spec, profile, home)):  # as in Slurm, an element does not end the others
        if code := run_element(task, spec, folder):
            element = f" element {index}" if spec.is_array else ""
            tell(f"{spec.name}:{element} failed with exit code {code}; every rank's output is in {folder}")
            first_bad = first_bad or code
    return Submission(spec.name, (), (folder,), first_bad)


def run_element(task: ContainerTask, spec: JobSpec, folder: Path) -> int:
    from submitit import LocalExecutor

    executor = LocalExecutor(folder, python=interpreter(task.home))
    executor.update_parameters(
        tasks_per_node=spec.tasks,
        gpus_per_node=spec.resources.gpus_per_node,
        timeout_min=NO_LIMIT_MINUTES,
        stderr_to_stdout=True,
    )
    with signals({signal.SIGINT: signal.SIG_IGN}):  # Ctrl-C is ours to hand on, in wait(); the tasks inherit this
        job = executor.submit(task)
    with signals({signal.SIGTERM: signal.default_int_handler}):  # `kill` ends the job as Ctrl-C does
        return LocalRun(job).wait()


@contextlib.contextmanager
def signals(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """These handlers for a while."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LocalRun:
    """A running local job: shows rank 0's output, and ends all ranks when one of them fails."""

    def __init__(self, job: Any, poll_seconds: float = 0.2) -> None:
        self.ranks = [job.task(rank) for rank in range(job.num_tasks)]
        self.job, self.poll_seconds, self.shown = job, poll_seconds, 0

    def wait(self) -> int:
        """The first failed rank's exit code, or 0. Ctrl-C stops the job, and is raised again when it has ended."""
        try:
            first_bad = self.follow()
        except KeyboardInterrupt:
            self.follow(stopping=True)
            raise
        return first_bad or next(filter(None, (self.code(rank) for rank in self.ranks)), 0)

    def follow(self, stopping: bool = False) -> int:
        """Show the output until all ranks have ended; the code of the first that failed meanwhile, or 0.

        The ranks are asked to stop again and again: before ContainerTask has begun, submitit drops a TERM.
        """
        first_bad = 0
        while not self.job.done():
            self.show()
            first_bad = first_bad or self.failure()
            if stopping or first_bad:
                self.stop()
            time.sleep(self.poll_seconds)
        self.show()
        return first_bad

    def failure(self) -> int:
        ended = (rank for rank in self.ranks if rank.paths.result_pickle.exists())
        return next(filter(None, (self.code(rank) for rank in ended)), 0)

    def stop(self) -> None:
        """Ask all ranks to stop, as Slurm's --kill-on-bad-exit does; ContainerTask kills what does not."""
        self.job._process.terminate()

    def code(self, rank: Any) -> int:
        """What ContainerTask returned; 1 for a rank that died before it could return.

        Read from the file: submitit's `result()` waits until all ranks have ended.
        """
        from submitit.core.utils import pickle_load

        if not rank.paths.result_pickle.exists():
            return 1
        outcome, value = pickle_load(rank.paths.result_pickle)
        return value if outcome == "success" else 1

    def show(self) -> None:
        """Pass on what rank 0 has printed since last time, without submitit's own lines."""
        path = self.ranks[0].paths.stdout
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.shown)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1] if not self.job.done() else text
        self.shown += len(whole)
        lines = whole.decode(errors="replace").splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith("submitit ")))
        sys.stdout.flush()
