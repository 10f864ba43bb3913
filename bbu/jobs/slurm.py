"""Hands jobs to Slurm by submitit: the options of sbatch, arrays that fit the site, and the script for a dry run.

submitit is imported inside the functions that use it, so that `--help` stays quick.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile, GpuRequest
from bbu.jobs.launch import Note, Submission, new_folder, python_command, tasks_of
from bbu.jobs.queue import max_array_size, one_line
from bbu.jobs.spec import JobSpec, Resources, job_name


def submit_to_slurm(
    specs: tuple[JobSpec, ...], profile: ClusterProfile, checkout: Path, notify: Callable[[str], None], note: Note
) -> list[Submission]:
    """Submit all jobs, chained by dependency.

    Args:
        specs: the jobs, each after those that it waits for.
        profile: the site.
        checkout: the folder with the code.
        notify: receives lines for the person at the terminal.
        note: is called with each job, or each array of one, as soon as it is submitted.

    Returns:
        One Submission for each of `specs`.

    Raises:
        JobError: there is no Slurm here, or it refuses a job.
    """
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise JobError(f"no {missing[0]} on PATH; load Slurm, or run here with --cluster local")
    array_limit = max_array_size() if any(spec.is_array for spec in specs) else 1
    submitted: dict[str, Submission] = {}
    for spec in specs:
        before = awaited_ids(spec, {name: done.job_ids for name, done in submitted.items()})
        waits = f" after {', '.join(before)}" if before else ""
        ids: list[str] = []
        folders: list[Path] = []
        for number, chunk in enumerate(spec.chunks(array_limit)):
            job, folder = _submit_chunk(chunk, profile, checkout, before)
            note(Submission(spec.name, (job,), (folder,), None, number * array_limit, len(chunk.commands)))
            notify(f"{spec.name}: job {job}{waits}, logs {folder}")
            ids.append(job)
            folders.append(folder)
        submitted[spec.name] = Submission(spec.name, tuple(ids), tuple(folders), None, 0, len(spec.commands))
    return list(submitted.values())


def awaited_ids(spec: JobSpec, ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Return Slurm's ids of all jobs that must end before this one begins.

    Args:
        spec: the job.
        ids: Slurm's ids of the jobs of the same submission, by their names.
    """
    return [job for name in spec.after for job in ids[name]] + list(spec.after_jobs)


def _submit_chunk(spec: JobSpec, profile: ClusterProfile, checkout: Path, before: Sequence[str]) -> tuple[str, Path]:
    """Submit one job or array; return its id and the folder of its logs."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = new_folder(spec.name, profile)
    executor = SlurmExecutor(folder, python=python_command(checkout))
    executor.update_parameters(**_slurm_parameters(spec, profile, before))
    try:
        with executor.batch():  # more than one become an array
            jobs = [executor.submit(task) for task in tasks_of(spec, profile, checkout)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise JobError(f"Slurm refused job {spec.name}: {one_line(str(error))}") from error
    return jobs[0].job_id.partition("_")[0], folder


def script_text(spec: JobSpec, profile: ClusterProfile, checkout: Path, folder: str, before: Sequence[str]) -> str:
    """Return the batch script that would be submitted: submitit's own text.

    Args:
        spec: one job, or an array that fits the site.
        profile: the site.
        checkout: the folder with the code.
        folder: where the script says that its files lie.
        before: Slurm's ids of the jobs that must end first.
    """
    from submitit.slurm.slurm import _make_sbatch_string  # what SlurmExecutor itself calls; submitit is pinned

    command = f"{python_command(checkout)} -u -m submitit.core._submit {folder}"
    elements = len(spec.commands) if spec.is_array else None
    parameters = _slurm_parameters(spec, profile, before)
    return _make_sbatch_string(command=command, folder=folder, map_count=elements, **parameters)


def _slurm_parameters(spec: JobSpec, profile: ClusterProfile, before: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of submitit's SlurmExecutor; what the profile leaves out is left out."""
    resources = spec.resources
    kind = "afterany" if spec.after_any else "afterok"
    additional = {
        "requeue": True,
        "kill-on-invalid-dep": "yes",  # a job whose dependency failed would otherwise wait for ever
        **dict(_gpu_options(resources, profile.gpu_request)),
        **dict(_memory_options(resources.memory)),
        **({"nice": resources.nice} if resources.nice else {}),
    }
    optional = {
        **_placement_options(resources),
        "exclusive": resources.exclusive or None,
        "dependency": f"{kind}:{':'.join(before)}" if before else None,
        "setup": [f"module load {module}" for module in profile.modules] or None,
    }
    required = {
        "job_name": job_name(spec.name),
        "nodes": spec.nodes,
        "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "time": resources.time_minutes,
        "signal_delay_s": profile.signal_seconds,
        "array_parallelism": profile.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default is one that a site may not know
        # since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch
        "srun_args": [f"--cpus-per-task={resources.cpus_per_task}", "--kill-on-bad-exit=1", "--open-mode=append"],
        "additional_parameters": additional,
    }
    return required | {name: value for name, value in optional.items() if value is not None}


def sbatch_options(resources: Resources, gpu_request: GpuRequest) -> list[str]:
    """Return what a job requests as options of sbatch or srun, and of the `#SCRON` lines of a scrontab.

    Args:
        resources: what the job requests.
        gpu_request: the option for GPUs that the site wants: `gpus-per-node` or `gres`.
    """
    chosen = (
        _placement_options(resources)
        | dict(_gpu_options(resources, gpu_request))
        | dict(_memory_options(resources.memory))
    )
    numbers = {"cpus-per-task": resources.cpus_per_task, "time": resources.time_minutes, "nice": resources.nice or None}
    chosen |= {name: str(value) for name, value in numbers.items() if value is not None}
    return [f"--{name}={value}" for name, value in chosen.items()] + ["--exclusive"] * resources.exclusive


def _placement_options(resources: Resources) -> dict[str, str]:
    """Where a job may run and on whose account; what the profile leaves out is left out."""
    texts = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
    }
    return {name: value for name, value in texts.items() if value is not None}


def _gpu_options(resources: Resources, gpu_request: GpuRequest) -> Iterator[tuple[str, str]]:
    """Per node, never per task: a task that sees its own GPU alone cannot reach its neighbours' by peer-to-peer."""
    if resources.gpus_per_node:
        number = str(resources.gpus_per_node)
        gpus = f"{resources.gpu_type}:{number}" if resources.gpu_type else number
        yield ("gres", f"gpu:{gpus}") if gpu_request == "gres" else ("gpus-per-node", gpus)


def _memory_options(memory: str | None) -> Iterator[tuple[str, str]]:
    """`512G`, `8G per cpu`, `64G per gpu` or `all`, as a profile states it, in sbatch's form."""
    if memory:
        amount, _, unit = memory.partition(" per ")
        yield (f"mem-per-{unit}" if unit else "mem"), ("0" if amount == "all" else amount)
