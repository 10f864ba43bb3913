"""Where jobs go: to Slurm, to this machine, or into the text of a dry run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import Note, Submission, job_environment, task_command
from bbu.jobs.local import run_here
from bbu.jobs.queue import max_array_size
from bbu.jobs.slurm import awaited_ids, script_text, submit_to_slurm
from bbu.jobs.spec import JobSpec, in_order


def submit(
    specs: tuple[JobSpec, ...],
    profile: ClusterProfile,
    home: Path,
    tell: Callable[[str], None],
    note: Note = lambda done: None,
) -> list[Submission]:
    """Submit all jobs to Slurm, chained by dependency, or run them here one after the other.

    tell: hears what happens, in words; note: is given each job as soon as it exists.

    Here a job that failed ends the row, unless the next one does not mind; the first bad code is the last
    Submission's. Raises JobError if there is no Slurm here, or if it refuses a job.
    """
    ordered = in_order(specs)
    if profile.executor == "slurm":
        return submit_to_slurm(ordered, profile, home, tell, note)
    tell("no Slurm in this profile: running here, one job after the other (submitit's local executor)")
    done: dict[str, Submission] = {}
    for spec in ordered:
        if not spec.after_any and any(name not in done or done[name].exit_code for name in spec.after):
            continue
        done[spec.name] = run_here(spec, profile, home, tell, note)
    return list(done.values())


def dry_run(specs: tuple[JobSpec, ...], profile: ClusterProfile, home: Path) -> str:
    """Exactly what `submit` would do, for a person to read; touches nothing.

    Only what does not exist before is named by a placeholder: ids, and the folders of submitit's files.
    """
    return "\n\n".join(part for spec in in_order(specs) for part in describe(spec, profile, home))


def describe(spec: JobSpec, profile: ClusterProfile, home: Path) -> Iterator[str]:
    if profile.executor == "local":
        waits = f", after {', '.join(spec.after)}" if spec.after else ""
        yield "\n".join([f"### {spec.name}: {spec.tasks} tasks on this machine{waits}", *commands(spec, profile, home)])
        return
    before = awaited_ids(spec, {name: (f"<id of {name}>",) for name in spec.after})
    parts = list(spec.chunks(max_array_size() if spec.is_array else 1))
    for number, part in enumerate(parts, 1):
        of = f" (array {number} of {len(parts)})" if len(parts) > 1 else ""
        folder = f"{Path(profile.work_folder).absolute()}/<time>-{spec.name}-<random>"
        script = script_text(part, profile, home, folder, before)
        yield "\n".join([f"### {spec.name}{of}: sbatch {folder}/submission_file_<random>.sh", script])
        yield "\n".join([f"### {spec.name}{of}: what each of its tasks runs", *commands(part, profile, home)])


def commands(spec: JobSpec, profile: ClusterProfile, home: Path) -> Iterator[str]:
    """The settings that all tasks share, then a command for each element."""
    settings = job_environment(spec, profile, home)
    yield from (f"export {name}={shlex.quote(value)}" for name, value in settings.items())
    for index, command in enumerate(spec.commands):
        element = f"  # element {index}" if spec.is_array else ""
        yield shlex.join(task_command(home, profile.image, command)) + element
