"""The state of runs: from the trainer's own status file, from squeue, and from accounting where there is any."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bbu.errors import CheckpointError, JobError
from bbu.jobs.control import jobs_of_record, queue_keys, status_jobs
from bbu.jobs.queue import JobsByKey, QueuedJob, find_jobs, live_jobs, most_restarts, summarise_states
from bbu.jobs.records import JobRecord, read_records
from bbu.jobs.schedule import FAILED, Schedule
from bbu.run.files import age_of
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status

_SCHEDULED = "scheduled"
"""A further eval will come."""
_ENDED = "ended"
"""No further eval comes, and none is needed."""
_BROKEN = "BROKEN"
"""No further eval comes though one should."""
_UNKNOWN = "unknown"
_SILENT = "Slurm does not answer"
_STALE_AFTER_SECONDS = 60.0
"""For a status that does not say how old it may become."""


@dataclass(frozen=True)
class JobView:
    """One job of a run as it stands."""

    name: str
    """`train`, `eval` and so on."""
    ids: tuple[str, ...]
    """Slurm's; empty for a job that ran on this machine."""
    text: str
    """For a person: `RUNNING`, `5 COMPLETED, 3 PENDING (Priority)`, `gone`."""
    jobs: tuple[QueuedJob, ...]
    """Its elements as Slurm has them."""

    @property
    def is_live(self) -> bool:
        return any(job.is_live for job in self.jobs)


@dataclass(frozen=True)
class ScheduleView:
    """One schedule of evals as it stands."""

    state: str
    """`scheduled`, `ended`, `unknown`, or `BROKEN`: no further eval comes though one should."""
    text: str
    """How often, by which means, and why it has this state."""


@dataclass(frozen=True)
class RunView:
    """One run as it stands."""

    run: RunFolder
    """Its folder."""
    status: RunStatus
    """The trainer's own status; empty before its first step."""
    age: float | None
    """Seconds since the status was written, by the filesystem's clock; None without a status."""
    jobs: tuple[JobView, ...]
    """Its jobs, oldest first."""
    schedules: tuple[ScheduleView, ...]
    """Its schedules of evals, oldest first."""
    restarts: int
    """How often its training was requeued."""

    @property
    def is_stale(self) -> bool:
        """Whether the status says that the trainer runs, but has not been renewed in time."""
        training = self.status.phase == "training"
        return bool(
            training and self.age is not None and self.age > (self.status.stale_after_s or _STALE_AFTER_SECONDS)
        )

    @property
    def evals(self) -> str:
        """The worst state of its schedules; empty without any."""
        states = {schedule.state for schedule in self.schedules}
        return next((state for state in (_BROKEN, _UNKNOWN, _SCHEDULED, _ENDED) if state in states), "")

    @property
    def training(self) -> JobView | None:
        """The live training job, else the newest. A second one fails while the first holds the run folder."""
        newest_first = [job for job in reversed(self.jobs) if job.name == "train"]
        return next((job for job in newest_first if job.is_live), newest_first[0] if newest_first else None)

    @property
    def state(self) -> str:
        """What the run does, in a few words: the trainer's phase, and its job's state where that adds something."""
        phase, job = self.status.state, self.training
        if job is not None and job.text == _SILENT:
            return f"{phase or 'not begun'}, {_SILENT}"
        if job is None or not job.jobs:
            return "lost: no job, no heartbeat" if self.is_stale else str(phase or "not begun")
        if phase == "completed" and not job.is_live:
            return "completed"
        if job.is_live:
            return f"{phase}, {job.text}" if phase in ("training", "stopped") else job.text
        return f"{phase or 'not begun'}, {job.text}"


def view_runs(runs: Sequence[RunFolder]) -> list[RunView]:
    """Look at runs; Slurm is queried once for all of them. Raises CheckpointError for damaged records."""
    records = {run.root: read_records(run) for run in runs}
    statuses = {run.root: _readable_status(run) for run in runs}
    jobs = _query_slurm({key for run in runs for key in queue_keys(records[run.root], statuses[run.root])})
    return [_view_run(run, records[run.root], statuses[run.root], jobs) for run in runs]


def _query_slurm(keys: Collection[str]) -> JobsByKey | None:
    """The jobs with these keys; None where Slurm does not answer."""
    try:
        return find_jobs(keys)
    except JobError:
        return None


def _readable_status(run: RunFolder) -> RunStatus:
    """The trainer's status, empty before it begins; one damaged file must not hide all other runs."""
    try:
        return read_status(run)
    except CheckpointError:
        return RunStatus(phase="status.json cannot be read")


def _view_run(run: RunFolder, records: Sequence[JobRecord], status: RunStatus, jobs: JobsByKey | None) -> RunView:
    views = [_view_job(record, jobs) for record in records if record.schedule is None]
    views += _view_status_job(status, views, jobs or {})
    training_jobs = [job for view in views if view.name == "train" for job in view.jobs]
    return RunView(
        run=run,
        status=status,
        age=_status_age(run) if status.phase else None,
        jobs=tuple(views),
        schedules=tuple(_view_schedule(record.schedule, run, jobs) for record in records if record.schedule),
        restarts=max(status.restart_count, most_restarts(training_jobs) or 0),  # accounting does not count them
    )


def _view_job(record: JobRecord, jobs: JobsByKey | None) -> JobView:
    """A job by its record; a failed one with its exit code."""
    if not record.ids:
        return JobView(record.name, (), "ran here", ())
    if jobs is None:
        return JobView(record.name, record.ids, _SILENT, ())
    matches = jobs_of_record(record, jobs)
    text = summarise_states(matches) if matches else "gone"
    codes = sorted({job.exit_code for job in matches if job.exit_code})
    text += f", exit code {', '.join(map(str, codes))}" if codes else ""
    return JobView(record.name, record.ids, text, tuple(matches))


def _view_status_job(status: RunStatus, views: Sequence[JobView], jobs: JobsByKey) -> list[JobView]:
    """The job that the trainer's status names, unless it is among `views`: one of an sbatch template."""
    number = status.job_id
    if number is None or any(job.number == number for view in views for job in view.jobs):
        return []
    matches = status_jobs(status, jobs)
    return [JobView("train", (number,), summarise_states(matches), tuple(matches))] if matches else []


def _view_schedule(schedule: Schedule, run: RunFolder, jobs: JobsByKey | None) -> ScheduleView:
    state, text = _schedule_state(schedule, run, jobs)
    return ScheduleView(state, f"every {schedule.minutes} minutes by {schedule.mode}: {text}")


def _schedule_state(schedule: Schedule, run: RunFolder, jobs: JobsByKey | None) -> tuple[str, str]:
    """Whether a further eval will come, and why or why not."""
    if not schedule.folder.is_dir():
        return _BROKEN, f"{schedule.folder} is gone"
    if reason := schedule.end_reason():
        return (_BROKEN if reason.startswith(FAILED) else _ENDED), reason
    if str(run.root) not in schedule.runs():
        return _ENDED, "cancelled for this run"
    if jobs is None:
        return _UNKNOWN, _SILENT
    schedule_jobs = [job for key in schedule.job_keys() for job in jobs.get(key, [])]
    waiting = live_jobs(schedule_jobs)
    if not waiting:
        return _BROKEN, "no job is waiting; cancel it, and submit it again"
    failed = [job for job in schedule_jobs if job.exit_code]
    failure = f"; job {failed[-1].id} failed with {failed[-1].exit_code}" if failed else ""
    return _SCHEDULED, f"next: {summarise_states(waiting)}{failure}"


def _status_age(run: RunFolder) -> float:
    """Seconds since the status was written: by the filesystem's clock, or by this machine's in a read-only folder."""
    if os.access(run.root, os.W_OK):
        return max(0.0, age_of(run.status))
    return max(0.0, time.time() - run.status.stat().st_mtime)
