"""Hands jobs to Slurm by submitit: what sbatch is told, arrays that fit the site, and the script for a dry run.

submitit is imported inside the functions that use it, so that `--help` stays quick.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import Note, Submission, interpreter, new_folder, tasks_of
from bbu.jobs.queue import max_array_size, one_line
from bbu.jobs.spec import JobSpec, Resources, job_name


def submit_to_slurm(
    specs: tuple[JobSpec, ...], profile: ClusterProfile, home: Path, tell: Callable[[str], None], note: Note
) -> list[Submission]:
    """Submit all jobs, chained by dependency. Raises JobError if there is no Slurm here, or if it refuses a job."""
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise JobError(f"no {missing[0]} on PATH; load Slurm, or run here with --cluster local")
    most = max_array_size() if any(spec.is_array for spec in specs) else 1
    submitted: dict[str, Submission] = {}
    for spec in specs:
        before = waited_for(spec, {name: done.job_ids for name, done in submitted.items()})
        waits = f" after {', '.join(before)}" if before else ""
        ids: list[str] = []
        folders: list[Path] = []
        for number, chunk in enumerate(spec.chunks(most)):
            job, folder = sbatch(chunk, profile, home, before)
            note(Submission(spec.name, (job,), (folder,), None, number * most, len(chunk.commands)))
            tell(f"{spec.name}: job {job}{waits}, logs {folder}")
            ids.append(job)
            folders.append(folder)
        submitted[spec.name] = Submission(spec.name, tuple(ids), tuple(folders), None, 0, len(spec.commands))
    return list(submitted.values())


def waited_for(spec: JobSpec, ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Slurm's ids of all jobs that must end before this one begins."""
    return [job for name in spec.after for job in ids[name]] + list(spec.after_jobs)


def sbatch(spec: JobSpec, profile: ClusterProfile, home: Path, before: Sequence[str]) -> tuple[str, Path]:
    """Submit one job or array; its id and the folder of its logs."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = new_folder(spec.name, profile)
    executor = SlurmExecutor(folder, python=interpreter(home))
    executor.update_parameters(**slurm_parameters(spec, profile, before))
    try:
        with executor.batch():  # more than one become an array
            jobs = [executor.submit(task) for task in tasks_of(spec, profile, home)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise JobError(f"Slurm refused job {spec.name}: {one_line(str(error))}") from error
    return jobs[0].job_id.partition("_")[0], folder


def script_text(spec: JobSpec, profile: ClusterProfile, home: Path, folder: str, before: Sequence[str]) -> str:
    """The batch script that `sbatch` would submit, submitit's own text, with `folder` for its files."""
    from submitit.slurm.slurm import _make_sbatch_string  # what SlurmExecutor itself calls; submitit is pinned

    command = f"{interpreter(home)} -u -m submitit.core._submit {folder}"
    elements = len(spec.commands) if spec.is_array else None
    parameters = slurm_parameters(spec, profile, before)
    return _make_sbatch_string(command=command, folder=folder, map_count=elements, **parameters)


def slurm_parameters(spec: JobSpec, profile: ClusterProfile, before: Sequence[str]) -> dict[str, Any]:
    """The arguments of submitit's SlurmExecutor; what the profile leaves out is left out."""
    asked = spec.resources
    kind = "afterany" if spec.after_any else "afterok"
    additional = {
        "requeue": True,
        "kill-on-invalid-dep": "yes",  # a job whose dependency failed would otherwise wait for ever
        **dict(gpu_options(asked, profile.gpu_request)),
        **dict(memory_options(asked.memory)),
        **({"nice": asked.nice} if asked.nice else {}),
    }
    optional = {
        **placement(asked),
        "exclusive": asked.exclusive or None,
        "dependency": f"{kind}:{':'.join(before)}" if before else None,
        "setup": [f"module load {module}" for module in profile.modules] or None,
    }
    required = {
        "job_name": job_name(spec.name),
        "nodes": spec.nodes,
        "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "time": asked.time_minutes,
        "signal_delay_s": profile.signal_seconds,
        "array_parallelism": profile.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default is one that a site may not know
        # since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch
        "srun_args": [f"--cpus-per-task={asked.cpus_per_task}", "--kill-on-bad-exit=1", "--open-mode=append"],
        "additional_parameters": additional,
    }
    return required | {name: value for name, value in optional.items() if value is not None}


def sbatch_options(asked: Resources, gpu_request: str) -> list[str]:
    """The same for a command line of sbatch or srun, and for the `#SCRON` lines of a scrontab."""
    chosen = placement(asked) | dict(gpu_options(asked, gpu_request)) | dict(memory_options(asked.memory))
    numbers = {"cpus-per-task": asked.cpus_per_task, "time": asked.time_minutes, "nice": asked.nice or None}
    chosen |= {name: str(value) for name, value in numbers.items() if value is not None}
    return [f"--{name}={value}" for name, value in chosen.items()] + ["--exclusive"] * asked.exclusive


def placement(asked: Resources) -> dict[str, str]:
    """Where a job may run and on whose account; what the profile leaves out is left out."""
    texts = {"partition": asked.partition, "account": asked.account, "qos": asked.qos, "constraint": asked.constraint}
    return {name: value for name, value in texts.items() if value is not None}


def gpu_options(asked: Resources, gpu_request: str) -> Iterator[tuple[str, str]]:
    """Per node, never per task: a task that sees its own GPU alone cannot reach its neighbours' by peer-to-peer."""
    if asked.gpus_per_node:
        wanted = f"{asked.gpu_type}:{asked.gpus_per_node}" if asked.gpu_type else str(asked.gpus_per_node)
        yield ("gres", f"gpu:{wanted}") if gpu_request == "gres" else ("gpus-per-node", wanted)


def memory_options(memory: str | None) -> Iterator[tuple[str, str]]:
    """`512G`, `8G per cpu`, `64G per gpu`, `all`: what a profile says, as sbatch wants it."""
    if memory:
        amount, _, unit = memory.partition(" per ")
        yield (f"mem-per-{unit}" if unit else "mem"), ("0" if amount == "all" else amount)
