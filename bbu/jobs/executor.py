"""Hands jobs to submitit: Slurm, this machine, or a dry run that only shows what would happen.

submitit is imported inside the functions that submit, so that `--help` stays quick.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.container import container_command, container_environment
from bbu.jobs.spec import JobSpec, in_order
from bbu.jobs.task import ContainerTask

NO_LIMIT_MINUTES = 60 * 24 * 365  # submitit's local executor wants a time limit; a laptop has none


@dataclass(frozen=True)
class Submission:
    """What became of one JobSpec: Slurm's id or None for a job run here, its logs, its exit code here."""

    name: str
    job_id: str | None
    logs: Path
    exit_code: int | None


def dry_run(specs: tuple[JobSpec, ...], profile: ClusterProfile, home: Path) -> str:
    """What `submit` would do, for a person to read; touches nothing."""
    return "\n".join(describe(spec, profile, home) for spec in in_order(specs))


def describe(spec: JobSpec, profile: ClusterProfile, home: Path) -> str:
    settings = [f"{name}={value}" for name, value in container_environment(profile, home, spec.gpus_per_node).items()]
    after = f" after {', '.join(spec.after)}" if spec.after else ""
    lines = [f"{spec.name}: {len(spec.commands)} x {spec.nodes} nodes x {spec.tasks_per_node} tasks"
             f" on {profile.executor}{after}"]  # fmt: skip
    if profile.executor == "slurm":
        lines += [f"  sbatch {name}={value}" for name, value in slurm_parameters(spec, profile, ()).items()]
    lines += [f"  {shlex.join([*settings, *container_command(home, profile.image, c)])}" for c in spec.commands]
    return "\n".join(lines)


def submit(
    specs: tuple[JobSpec, ...], profile: ClusterProfile, home: Path, tell: Callable[[str], None]
) -> list[Submission]:
    """Submit all jobs to Slurm, chained by dependency, or run them here one after the other.

    The local way stops at the first job that fails; its Submission is the last. Raises JobError if there is
    no Slurm here, or if it refuses a job.
    """
    ordered = in_order(specs)
    if profile.executor == "slurm":
        return submit_to_slurm(ordered, profile, home, tell)
    tell("no Slurm in this profile: running here, one job after the other (submitit's local executor)")
    done: list[Submission] = []
    for spec in ordered:
        done.append(run_here(spec, profile, home, tell))
        if done[-1].exit_code:
            break
    return done


def tasks_of(spec: JobSpec, profile: ClusterProfile, home: Path) -> list[ContainerTask]:
    environment = container_environment(profile, home, spec.gpus_per_node) | dict(spec.environment)
    return [
        ContainerTask(
            command=command,
            home=home,
            image=profile.image,
            environment=environment,
            max_requeues=spec.max_requeues,
            master_suffix=profile.master_suffix,
            grace_seconds=profile.signal_seconds,
        )
        for command in spec.commands
    ]


def new_folder(spec: JobSpec, profile: ClusterProfile) -> Path:
    """A folder of its own per submission: submitit names files by job id, and process ids come again."""
    root = Path(profile.work_folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    (root / ".gitignore").write_text("*\n")  # it may lie in the checkout
    folder = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{spec.name}-", dir=root))
    folder.chmod(0o755)
    return folder


def interpreter(home: Path) -> str:
    """This Python, able to import bbu from the checkout: submitit's pickles name its classes."""
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH", "")]))
    return shlex.join(["env", f"PYTHONPATH={path}", sys.executable])


def slurm_parameters(spec: JobSpec, profile: ClusterProfile, after: Sequence[str]) -> dict[str, Any]:
    """The arguments of submitit's SlurmExecutor; what the profile leaves out is left out."""
    optional = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gpus_per_node": spec.gpus_per_node or None,
        "mem": f"{round(spec.memory_gb * 1024)}M" if spec.memory_gb else None,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
    }
    required = {
        "job_name": f"bbu-{spec.name}",
        "nodes": spec.nodes,
        "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": spec.cpus_per_task,
        "time": spec.time_minutes,
        "signal_delay_s": profile.signal_seconds,
        "stderr_to_stdout": True,
        # since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch
        "srun_args": [f"--cpus-per-task={spec.cpus_per_task}", "--kill-on-bad-exit=1", "--open-mode=append"],
        # a job whose dependency failed would otherwise wait for ever
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
    }
    return required | {name: value for name, value in optional.items() if value is not None}


def submit_to_slurm(
    specs: tuple[JobSpec, ...], profile: ClusterProfile, home: Path, tell: Callable[[str], None]
) -> list[Submission]:
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise JobError(f"no {missing[0]} on PATH; load Slurm, or run here with --cluster local")
    submitted: dict[str, Submission] = {}
    for spec in specs:
        after = [submitted[name].job_id or "" for name in spec.after]
        submitted[spec.name] = sbatch(spec, profile, home, after)
        waits = f" after {', '.join(after)}" if after else ""
        tell(f"{spec.name}: job {submitted[spec.name].job_id}{waits}, logs {submitted[spec.name].logs}")
    return list(submitted.values())


def sbatch(spec: JobSpec, profile: ClusterProfile, home: Path, after: Sequence[str]) -> Submission:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(new_folder(spec, profile), python=interpreter(home))
    executor.update_parameters(**slurm_parameters(spec, profile, after))
    try:
        with executor.batch():  # more than one become an array
            jobs = [executor.submit(task) for task in tasks_of(spec, profile, home)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise JobError(f"Slurm refused job {spec.name}: {' '.join(str(error).split())}") from error
    return Submission(spec.name, jobs[0].job_id.partition("_")[0], executor.folder, None)


def run_here(spec: JobSpec, profile: ClusterProfile, home: Path, tell: Callable[[str], None]) -> Submission:
    """Run each element of a job on this machine, wait for it, and show what its first rank prints."""
    if spec.nodes > 1:
        tell(f"{spec.name}: {spec.nodes} nodes asked for, there is one: {spec.tasks} tasks run on it")
    folder = new_folder(spec, profile)
    tell(f"{spec.name}: logs {folder}")
    code = 0
    for task in tasks_of(spec, profile, home):
        code = run_element(task, spec, folder)
        if code:
            tell(f"{spec.name}: failed with exit code {code}; every rank's output is in {folder}")
            break
    return Submission(spec.name, None, folder, code)


def run_element(task: ContainerTask, spec: JobSpec, folder: Path) -> int:
    from submitit import LocalExecutor

    executor = LocalExecutor(folder, python=interpreter(task.home))
    executor.update_parameters(
        tasks_per_node=spec.tasks,
        gpus_per_node=spec.gpus_per_node,
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
