"""How runs stand: by the trainer's own status file, then squeue, and accounting where there is any."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bbu.errors import CheckpointError, JobError
from bbu.jobs.control import flat, ids_of, jobs_of_run
from bbu.jobs.queue import QueuedJob, jobs_of, restarts_of, summary
from bbu.jobs.records import JobRecord, remembered
from bbu.jobs.schedule import FAILED, Schedule
from bbu.run.files import age_of
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status

SCHEDULED, ENDED, BROKEN, UNKNOWN = "scheduled", "ended", "BROKEN", "unknown"
SILENT = "Slurm does not answer"


@dataclass(frozen=True)
class JobView:
    """One job of a run as it stands: `text` for people (`RUNNING`, `5 COMPLETED, 3 PENDING (Priority)`, `gone`)."""

    name: str
    ids: tuple[str, ...]
    text: str
    jobs: tuple[QueuedJob, ...]

    @property
    def is_live(self) -> bool:
        return any(job.is_live for job in self.jobs)


@dataclass(frozen=True)
class ScheduleView:
    """Evals that come again: SCHEDULED, ENDED on purpose, or BROKEN: none will come though one should."""

    state: str
    text: str


@dataclass(frozen=True)
class RunView:
    """One run as it stands. status: the trainer's own, empty before its first step; age: seconds since it was
    written, by the filesystem's clock.
    """

    run: RunFolder
    status: RunStatus
    age: float | None
    jobs: tuple[JobView, ...]
    schedules: tuple[ScheduleView, ...]
    restarts: int

    @property
    def is_stale(self) -> bool:
        """Whether the trainer says that it trains, and has not said so for too long."""
        training = self.status.phase == "training"
        return bool(training and self.age is not None and self.age > (self.status.stale_after_s or 60.0))

    @property
    def evals(self) -> str:
        """The worst that is to be said of its scheduled evals; empty without any."""
        states = {schedule.state for schedule in self.schedules}
        return next((state for state in (BROKEN, UNKNOWN, SCHEDULED, ENDED) if state in states), "")

    @property
    def training(self) -> JobView | None:
        """The training job that lives, else the newest: a second one fails while the first holds the folder."""
        found = [job for job in reversed(self.jobs) if job.name == "train"]
        return next((job for job in found if job.is_live), found[0] if found else None)

    @property
    def state(self) -> str:
        """What it does, in a word or two: the phase of the trainer, and of its job what that does not say."""
        phase, job = self.status.phase, self.training
        if job is not None and job.text == SILENT:
            return f"{phase or 'not begun'}, {SILENT}"
        if job is None or not job.jobs:
            return "lost: no job, no heartbeat" if self.is_stale else str(phase or "not begun")
        if phase == "completed" and not job.is_live:
            return "completed"
        if job.is_live:
            return f"{phase}, {job.text}" if phase in ("training", "preempted") else job.text
        return f"{phase or 'not begun'}, {job.text}"


def views_of(runs: Sequence[RunFolder]) -> list[RunView]:
    """Look at runs; Slurm is asked once for all of them."""
    records = {run.root: remembered(run) for run in runs}
    statuses = {run.root: status_of(run) for run in runs}
    known = ask_slurm({job for run in runs for job in ids_of(records[run.root], statuses[run.root])})
    return [view_of(run, records[run.root], statuses[run.root], known) for run in runs]


Known = dict[str, list[QueuedJob]] | None
"""Jobs by id; None where Slurm does not answer."""


def ask_slurm(ids: Collection[str]) -> Known:
    try:
        return jobs_of(ids)
    except JobError:
        return None


def status_of(run: RunFolder) -> RunStatus:
    """What the trainer says; one file that cannot be read is not to hide all other runs."""
    try:
        return read_status(run)
    except CheckpointError:
        return RunStatus(phase="status.json cannot be read")


def view_of(run: RunFolder, records: Sequence[JobRecord], status: RunStatus, known: Known) -> RunView:
    jobs = [job_view(record, known) for record in records if not record.is_schedule]
    jobs += by_sbatch(status, jobs, known or {})
    training = [job for view in jobs if view.name == "train" for job in view.jobs]
    return RunView(
        run=run,
        status=status,
        age=age(run) if status.phase else None,
        jobs=tuple(jobs),
        schedules=tuple(schedule_view(record, run, known) for record in records if record.is_schedule),
        restarts=max(status.restart_count, restarts_of(training) or 0),
    )


def job_view(record: JobRecord, known: Known) -> JobView:
    """A job that ended badly says how; one that ran here has no state of Slurm's."""
    if not record.ids:
        return JobView(record.name, (), "ran here", ())
    if known is None:
        return JobView(record.name, record.ids, SILENT, ())
    jobs = jobs_of_run(record, known)
    text = summary(jobs) if jobs else "gone"
    codes = sorted({job.exit_code for job in jobs if job.exit_code})
    text += f", exit code {', '.join(map(str, codes))}" if codes else ""
    return JobView(record.name, record.ids, text, tuple(jobs))


def by_sbatch(status: RunStatus, views: Sequence[JobView], known: dict[str, list[QueuedJob]]) -> list[JobView]:
    """The job that trains a run and was not submitted by bbu.submit; the status file names it."""
    number = status.job_id
    if number is None or any(job.number == number for view in views for job in view.jobs):
        return []
    found = [job for job in flat(known) if job.number == number and job.name.startswith("bbu-")]
    return [JobView("train", (number,), summary(found), tuple(found))] if found else []


def schedule_view(record: JobRecord, run: RunFolder, known: Known) -> ScheduleView:
    """How evals come again, and whether they really do."""
    schedule = Schedule.read(record.argv)
    state, text = schedule_state(schedule, run, known)
    return ScheduleView(state, f"every {schedule.minutes} minutes by {schedule.mode}: {text}")


def schedule_state(schedule: Schedule, run: RunFolder, known: Known) -> tuple[str, str]:
    if not schedule.folder.is_dir():
        return BROKEN, f"{schedule.folder} is gone"
    if ended := schedule.ended():
        return (BROKEN if ended.startswith(FAILED) else ENDED), ended
    if str(run.root) not in schedule.runs():
        return ENDED, "cancelled for this run"
    if known is None:
        return UNKNOWN, SILENT
    jobs = [job for key in schedule.job_keys() for job in known.get(key, [])]
    waiting = [job for job in jobs if job.is_live]
    if not waiting:
        return BROKEN, "no job is waiting; cancel it, and submit it again"
    bad = [job for job in jobs if job.exit_code]
    return SCHEDULED, f"next: {summary(waiting)}" + (
        f"; job {bad[-1].id} failed with {bad[-1].exit_code}" if bad else ""
    )


def age(run: RunFolder) -> float:
    """Seconds since the status was written; by our own clock where we may not write into the folder."""
    if os.access(run.root, os.W_OK):
        return max(0.0, age_of(run.status))
    return max(0.0, time.time() - run.status.stat().st_mtime)
