"""What one does to a run that was submitted: look at its output, end it, let it go on."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from bbu.errors import CheckpointError, JobError
from bbu.jobs.queue import QueuedJob, cancel, jobs_of, live, summary
from bbu.jobs.records import JobRecord, newest, remembered
from bbu.jobs.schedule import Schedule, drop
from bbu.rundir import RunFolder, read_status


def known_run(folder: str) -> RunFolder:
    """The run folder of that name. Raises CheckpointError for one that is none."""
    run = RunFolder(Path(folder).absolute())
    if not (run.jobs.is_file() or run.config.is_file()):
        raise CheckpointError(f"{folder}: not a run folder; name an output-{{run_name}} folder")
    return run


def ids_of(run: RunFolder, records: Sequence[JobRecord]) -> list[str]:
    """Slurm's ids of everything that was submitted for a run, and of the job that trains it by sbatch."""
    ids = [job for record in records for job in record.ids]
    ids += [key for record in records if record.is_schedule for key in Schedule.read(record.argv).job_keys()]
    status = read_status(run) or {}
    trained_by = status.get("SLURM_ARRAY_JOB_ID") or status.get("SLURM_JOB_ID")
    return list(dict.fromkeys([*ids, *([trained_by] if trained_by else [])]))


def jobs_of_run(record: JobRecord, known: dict[str, list[QueuedJob]]) -> list[QueuedJob]:
    """The jobs of one record that are this run's: of an array that several runs share, its own element."""
    found = [job for array in record.ids for job in known.get(array, [])]
    return [job for job in found if record.element is None or job.element in ("", str(record.element))]


def live_jobs(run: RunFolder) -> list[QueuedJob]:
    """A run's jobs in the queue or running, its schedule's own left out: that may serve other runs too."""
    records = remembered(run)
    known = jobs_of(ids_of(run, records))
    ours = [job for record in records if not record.is_schedule for job in jobs_of_run(record, known)]
    status = read_status(run) or {}
    by_sbatch = [job for job in flat(known) if job.number == status.get("SLURM_JOB_ID")]
    return live({job.id: job for job in [*ours, *by_sbatch]}.values())


def flat(known: dict[str, list[QueuedJob]]) -> list[QueuedJob]:
    return [job for jobs in known.values() for job in jobs]


def cancel_run(run: RunFolder) -> list[str]:
    """End all jobs of a run and take it out of its schedules; what was done, in words. What is saved stays."""
    told: list[str] = []
    schedules = [Schedule.read(record.argv) for record in remembered(run) if record.is_schedule]
    for schedule in schedules:
        if schedule.folder.is_dir() and drop(schedule, run.root):
            told.append(f"evals every {schedule.minutes} minutes: no more")
            if not schedule.ended():  # it serves other runs
                continue
            if left := live(flat(jobs_of(schedule.job_keys()))):
                cancel([job.id for job in left])
    if jobs := live_jobs(run):
        cancel([job.id for job in jobs])
        told += [f"{job.name} {job.id}: cancelled (was {job.state})" for job in jobs]
    return told


def resumption(run: RunFolder) -> JobRecord:
    """The record of the training that goes on. Raises JobError where nothing is to be done, or it is under way."""
    record = newest(run, "train")
    if (read_status(run) or {}).get("phase") == "completed":
        raise JobError(f"{run.root}: completed; raise max_steps or num_train_epochs to train further")
    busy = [job for job in live_jobs(run) if job.name == "bbu-train"]
    if busy:
        raise JobError(f"{run.root}: job {busy[0].id} is {summary(busy)}; nothing to resume")
    return record


def log_files(run: RunFolder, name: str | None, rank: str) -> list[str]:
    """The output of a run's newest job (of that name), rank `rank` or `all`; those of an array in order.

    Falls back on the trainer's own log where the run was not submitted from here. Files may not be there yet.
    """
    records = [record for record in remembered(run) if name is None or record.name == name]
    if not records:
        if name is not None:
            newest(run, name)
        return sorted(glob.glob(f"{glob.escape(str(run.logs))}/rank-{'*' if rank == 'all' else rank}.log"))
    return output_files(begun(records), rank)


def begun(records: Sequence[JobRecord]) -> JobRecord:
    """The newest record whose job has printed something; else the oldest: the first to begin."""
    return next((record for record in reversed(records) if output_files(record, "all")), records[0])


def output_files(record: JobRecord, rank: str) -> list[str]:
    """Files of one job: submitit's `{job}[_{element}]_{rank}_log.out`; of a schedule `{job}.out`."""
    if record.is_schedule:
        return sorted(glob.glob(f"{glob.escape(record.argv[2])}/*.out"), key=os.path.getmtime)[-1:]
    wanted = "[0-9]*" if rank == "all" else rank
    found: list[str] = []
    for index, folder in enumerate(record.folders):
        job = record.ids[index] if record.ids else "*"
        element = "" if record.element is None else f"_{record.element}"
        patterns = [f"{job}{element}_{wanted}_log.out"]
        if record.element is None:
            patterns.append(f"{job}_[0-9]*_{wanted}_log.out")
        found += [file for pattern in patterns for file in glob.glob(f"{glob.escape(folder)}/{pattern}")]
    return sorted(set(found), key=natural)


def natural(path: str) -> tuple[str, list[int]]:
    folder, _, name = path.rpartition("/")
    return folder, [int(part) for part in name.split("_") if part.isdigit()]
