"""What a person does with submitted runs: look at their output, cancel them, resume them."""

from __future__ import annotations

import dataclasses
import glob
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from bbu.errors import JobError
from bbu.jobs.queue import JobsByKey, QueuedJob, cancel_jobs, find_jobs, live_jobs, summarise_states
from bbu.jobs.records import JobRecord, newest_record, read_records
from bbu.jobs.request import Request
from bbu.jobs.schedule import remove_run
from bbu.jobs.spec import job_kind, job_name
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status

_LOOK_SECONDS = 10.0
"""How often to look for the first output of a job that waits."""


def queue_keys(records: Sequence[JobRecord], status: RunStatus) -> list[str]:
    """What to query Slurm for: the keys of all jobs of a run, of its schedules, and of a trainer started by sbatch.

    Args:
        records: the run's records.
        status: the trainer's own status; empty before it begins.
    """
    keys = [job for record in records for job in record.ids]
    keys += [key for record in records if record.schedule for key in record.schedule.job_keys()]
    training_job = status.job.get("SLURM_ARRAY_JOB_ID") or status.job_id
    return list(dict.fromkeys([*keys, *([training_job] if training_job else [])]))


def jobs_of_record(record: JobRecord, jobs: JobsByKey) -> list[QueuedJob]:
    """The jobs of one record that are its run's: of an array that several runs share, the run's own element.

    Jobs with another name are left out: another cluster, or a controller that began anew, may give an id again.
    """
    matches = [job for key in record.ids for job in jobs.get(key, []) if job.name == job_name(record.name)]
    return [job for job in matches if record.element is None or job.element in ("", str(record.element))]


def status_jobs(status: RunStatus, jobs: JobsByKey) -> list[QueuedJob]:
    """The job that the trainer's status names, if Slurm has it; it may have been submitted by an sbatch template."""
    return [job for group in jobs.values() for job in group if job.number == status.job_id and job_kind(job.name)]


def live_training_jobs(run: RunFolder) -> list[QueuedJob]:
    """The jobs in the queue, or running, that train this run and no other."""
    return [job for job in _live_jobs(run) if job_kind(job.name) == "train"]


def cancel_runs(runs: Sequence[RunFolder]) -> dict[RunFolder, list[str]]:
    """Cancel all jobs of some runs, and take the runs out of their schedules; checkpoints stay.

    A job that serves several runs ends only when all of them are named. Slurm is queried once for all runs, and
    called once to cancel.

    Returns:
        For each run what was done, a line each; no line where there was nothing to cancel.

    Raises:
        JobError: Slurm does not answer, or refuses.
    """
    records = {run: read_records(run) for run in runs}
    statuses = {run: read_status(run) for run in runs}
    jobs = find_jobs({key for run in runs for key in queue_keys(records[run], statuses[run])})
    roots = {str(run.root) for run in runs}
    lines: dict[RunFolder, list[str]] = {}
    to_cancel: list[QueuedJob] = []
    for run in runs:
        schedule_jobs, schedule_lines = _end_schedules(run, records[run], jobs)
        run_jobs = _cancellable_jobs(records[run], statuses[run], jobs, roots)
        job_lines = [f"{job.name} {job.id}: cancelled (was {job.state})" for job in run_jobs]
        shared_lines = list(_shared_job_lines(records[run], jobs, roots))
        lines[run] = [*schedule_lines, *job_lines, *shared_lines] or _local_training_lines(statuses[run])
        to_cancel += [*schedule_jobs, *run_jobs]
    if to_cancel:
        cancel_jobs(list(dict.fromkeys(job.id for job in to_cancel)))
    return lines


def training_to_resume(run: RunFolder) -> tuple[Request, Path]:
    """What resumes a run's training from its last checkpoint.

    A run that has begun keeps the settings that it began with, whatever its config file says by now.

    Returns:
        The request to submit, and the folder to submit it from.

    Raises:
        JobError: the run has no training job, is completed, or trains already.
    """
    record = newest_record(run, "train")
    if record.request is None:
        raise JobError(f"{run.jobs}: the training job has no request; submit the training again")
    if read_status(run).phase == "completed":
        raise JobError(f"{run.root}: completed; to train further, submit it with more max_steps or num_train_epochs")
    if jobs := live_training_jobs(run):
        raise JobError(f"{run.root}: job {jobs[0].id} is {summarise_states(jobs)}; nothing to resume")
    request = record.request.training_alone()
    if run.config.is_file():  # the resolved config: flat, with all overrides in it
        request = dataclasses.replace(request, config=str(run.config), use_new_config=False, overrides=())
    return request, Path(record.cwd)


def wait_for_log_files(
    run: RunFolder, name: str | None, rank: str, follow: bool, notify: Callable[[str], None]
) -> list[str]:
    """The output of a run's newest job, as soon as there is any.

    Args:
        run: the run.
        name: of the job, such as `train`; None: the newest that printed something.
        rank: number of the task, or `all`.
        follow: wait for the first output while jobs are in the queue.
        notify: receives a line about what is waited for, each time that nothing is there.

    Raises:
        JobError: there is no output, and nothing to wait for.
    """
    while not (files := _log_files(run, name, rank)):
        jobs = _live_jobs(run)
        states = ", ".join(f"{job.name} {job.id} is {job.state}" for job in jobs) or "no job is in the queue"
        if not (follow and jobs):
            raise JobError(f"{run.root}: no output yet; {states}")
        notify(f"no output yet; {states}")
        time.sleep(_LOOK_SECONDS)
    return files


def _log_files(run: RunFolder, name: str | None, rank: str) -> list[str]:
    """The output of a run's newest job; empty while it has printed nothing.

    Where the run was not submitted by bbu.submit, it is the trainer's own log.

    Args:
        run: the run.
        name: of the job, such as `train`; None: the newest that printed something.
        rank: number of the task, or `all`.

    Returns:
        Paths; those of an array in the order of its elements.

    Raises:
        JobError: a name that no job of the run has.
    """
    records = [record for record in read_records(run) if name is None or record.name == name]
    if records:
        return _output_files(_newest_with_output(records), rank)
    if name is not None:
        newest_record(run, name)  # raises: there is none
    return sorted(glob.glob(f"{glob.escape(str(run.logs))}/rank-{'*' if rank == 'all' else rank}.log"))


def _live_jobs(run: RunFolder) -> list[QueuedJob]:
    """A run's jobs in the queue or running; without its schedule's, and without those that serve other runs too."""
    records, status = read_records(run), read_status(run)
    return _cancellable_jobs(records, status, find_jobs(queue_keys(records, status)), ())


def _cancellable_jobs(
    records: Sequence[JobRecord], status: RunStatus, jobs: JobsByKey, roots: Collection[str]
) -> list[QueuedJob]:
    """The live jobs of a run that serve no runs besides those with the folders `roots`."""
    submitted = [job for record in records if not _serves_others(record, roots) for job in jobs_of_record(record, jobs)]
    return live_jobs({job.id: job for job in [*submitted, *status_jobs(status, jobs)]}.values())


def _serves_others(record: JobRecord, roots: Collection[str]) -> bool:
    return record.schedule is not None or bool(set(record.runs) - set(roots))


def _end_schedules(run: RunFolder, records: Sequence[JobRecord], jobs: JobsByKey) -> tuple[list[QueuedJob], list[str]]:
    """Take a run out of its schedules. Returns the live jobs of schedules that ended thereby, and a line for each."""
    to_cancel: list[QueuedJob] = []
    lines: list[str] = []
    for schedule in (record.schedule for record in records if record.schedule):
        schedule_jobs = [job for key in schedule.job_keys() for job in jobs.get(key, [])]
        if remove_run(schedule, run.root):
            lines.append(f"evals every {schedule.minutes} minutes: cancelled")
            to_cancel += [] if schedule.runs() else live_jobs(schedule_jobs)
    return to_cancel, lines


def _shared_job_lines(records: Sequence[JobRecord], jobs: JobsByKey, roots: Collection[str]) -> Iterator[str]:
    """A line for each live job that is left because it serves other runs too."""
    for record in records:
        if record.runs and _serves_others(record, roots) and live_jobs(jobs_of_record(record, jobs)):
            number = len(record.runs)
            yield f"{record.name} {', '.join(record.ids)}: left, it serves {number} runs; name them all to end it"


def _local_training_lines(status: RunStatus) -> list[str]:
    """Where a run trains without Slurm: its process belongs to somebody's terminal and is not ended from here."""
    if status.phase != "training" or status.job_id:
        return []
    return [f"trains outside of Slurm, as process {status.pid} on {status.host}: stop it there (Ctrl-C, or kill)"]


def _newest_with_output(records: Sequence[JobRecord]) -> JobRecord:
    """The newest record whose job has printed something; else the oldest, which begins first."""
    return next((record for record in reversed(records) if _output_files(record, "all")), records[0])


def _output_files(record: JobRecord, rank: str) -> list[str]:
    """Files of one job: submitit's `{job}[_{element}]_{rank}_log.out`; of a schedule the newest `{job}.out`."""
    if record.schedule is not None:
        return sorted(glob.glob(f"{glob.escape(str(record.schedule.folder))}/*.out"), key=os.path.getmtime)[-1:]
    rank_pattern = "[0-9]*" if rank == "all" else rank
    files: set[str] = set()
    for index, folder in enumerate(record.folders):
        job = record.ids[index] if record.ids else "*"
        element = "" if record.element is None else f"_{record.element}"
        patterns = [f"{job}{element}_{rank_pattern}_log.out"]
        if record.element is None:
            patterns.append(f"{job}_[0-9]*_{rank_pattern}_log.out")
        files |= {file for pattern in patterns for file in glob.glob(f"{glob.escape(folder)}/{pattern}")}
    return sorted(files, key=_numeric_order)


def _numeric_order(path: str) -> tuple[str, list[int]]:
    """Sorts `9_10_0_log.out` after `9_2_0_log.out`."""
    folder, _, name = path.rpartition("/")
    return folder, [int(part) for part in name.split("_") if part.isdigit()]
