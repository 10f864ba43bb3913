"""What one does to a run that was submitted: look at its output, end it, let it go on."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from bbu.errors import CheckpointError, JobError
from bbu.jobs.queue import QueuedJob, cancel, jobs_of, live, summary
from bbu.jobs.records import JobRecord, newest, remembered
from bbu.jobs.schedule import Schedule, drop
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status


def known_run(folder: str) -> RunFolder:
    """The run folder of that name. Raises CheckpointError for one that is none."""
    run = RunFolder(Path(folder).resolve())
    if not (run.jobs.is_file() or run.config.is_file()):
        raise CheckpointError(f"{folder}: not a run folder; name an output-{{run_name}} folder")
    return run


def ids_of(records: Sequence[JobRecord], status: RunStatus) -> list[str]:
    """Slurm's ids of everything that was submitted for a run, and of the job that trains it by sbatch."""
    ids = [job for record in records for job in record.ids]
    ids += [key for record in records if record.is_schedule for key in Schedule.read(record.argv).job_keys()]
    trained_by = status.job.get("SLURM_ARRAY_JOB_ID") or status.job_id
    return list(dict.fromkeys([*ids, *([trained_by] if trained_by else [])]))


def jobs_of_run(record: JobRecord, known: dict[str, list[QueuedJob]]) -> list[QueuedJob]:
    """The jobs of one record that are this run's: of an array that several runs share, its own element.

    They must have the record's name: another cluster, or a controller that began anew, may give an id again.
    """
    found = [job for array in record.ids for job in known.get(array, []) if job.name == f"bbu-{record.name}"]
    return [job for job in found if record.element is None or job.element in ("", str(record.element))]


def live_jobs(run: RunFolder) -> list[QueuedJob]:
    """A run's own jobs in the queue or running; not its schedule's, nor any that serves other runs too."""
    records, status = remembered(run), read_status(run)
    return own_jobs(records, status, jobs_of(ids_of(records, status)), ())


def live_training(run: RunFolder) -> list[QueuedJob]:
    """Those of them that train it."""
    return [job for job in live_jobs(run) if job.name == "bbu-train"]


def own_jobs(
    records: Sequence[JobRecord],
    status: RunStatus,
    known: dict[str, list[QueuedJob]],
    together: Collection[str],
) -> list[QueuedJob]:
    """The living jobs of a run that serve no run besides those of `together`."""
    ours = [job for record in records if not serves_others(record, together) for job in jobs_of_run(record, known)]
    by_sbatch = [job for job in flat(known) if job.number == status.job_id and job.name.startswith("bbu-")]
    return live({job.id: job for job in [*ours, *by_sbatch]}.values())


def serves_others(record: JobRecord, together: Collection[str]) -> bool:
    return record.is_schedule or bool(set(record.runs) - set(together))


def flat(known: dict[str, list[QueuedJob]]) -> list[QueuedJob]:
    return [job for jobs in known.values() for job in jobs]


def cancel_runs(runs: Sequence[RunFolder]) -> dict[RunFolder, list[str]]:
    """End all jobs of some runs and take them out of their schedules; what was done, in words. What is saved stays.

    A job that serves several runs ends only when all of them are named. Slurm is asked and told once for all runs.
    """
    records = {run: remembered(run) for run in runs}
    statuses = {run: read_status(run) for run in runs}
    known = jobs_of({job for run in runs for job in ids_of(records[run], statuses[run])})
    together = {str(run.root) for run in runs}
    told: dict[RunFolder, list[str]] = {}
    ending: list[QueuedJob] = []
    for run in runs:
        ended, words = end_schedules(run, records[run], known)
        ours = own_jobs(records[run], statuses[run], known, together)
        words += [f"{job.name} {job.id}: cancelled (was {job.state})" for job in ours]
        words += [*left_alone(records[run], known, together)]
        told[run] = words or local_run(statuses[run])
        ending += [*ended, *ours]
    if ending:
        cancel(list(dict.fromkeys(job.id for job in ending)))
    return told


def end_schedules(
    run: RunFolder, records: Sequence[JobRecord], known: dict[str, list[QueuedJob]]
) -> tuple[list[QueuedJob], list[str]]:
    """Take a run out of its schedules: the jobs of those that thereby ended, and words."""
    ended: list[QueuedJob] = []
    told: list[str] = []
    for schedule in (Schedule.read(record.argv) for record in records if record.is_schedule):
        jobs = [job for key in schedule.job_keys() for job in known.get(key, [])]
        if drop(schedule, run.root):
            told.append(f"evals every {schedule.minutes} minutes: no more")
            ended += [] if schedule.runs() else live(jobs)
    return ended, told


def left_alone(
    records: Sequence[JobRecord], known: dict[str, list[QueuedJob]], together: Collection[str]
) -> Iterator[str]:
    for record in records:
        if record.runs and serves_others(record, together) and live(jobs_of_run(record, known)):
            number = len(record.runs)
            yield f"{record.name} {', '.join(record.ids)}: left, it serves {number} runs; name them all to end it"


def local_run(status: RunStatus) -> list[str]:
    """A run that trains outside of Slurm is not ours to end, but ours to tell of."""
    if status.phase != "training" or status.job_id:
        return []
    return [f"trains outside of Slurm, as process {status.pid} on {status.host}: stop it there (Ctrl-C, or kill)"]


def resumption(run: RunFolder) -> JobRecord:
    """The record of the training that goes on. Raises JobError where nothing is to be done, or it is under way."""
    record = newest(run, "train")
    if read_status(run).phase == "completed":
        raise JobError(f"{run.root}: completed; to train further, submit it with more max_steps or num_train_epochs")
    if busy := live_training(run):
        raise JobError(f"{run.root}: job {busy[0].id} is {summary(busy)}; nothing to resume")
    if not run.config.is_file():
        return record  # it has not begun
    return dataclasses.replace(record, argv=(*before_config(record.argv), "--config", str(run.config)))


def before_config(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line without its run config: a run goes on with the settings that it began with."""
    return tuple(argv[: argv.index("--config")])


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
