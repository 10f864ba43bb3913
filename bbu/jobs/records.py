"""`jobs.jsonl` of a run folder: which jobs were submitted for the run, and by which request.

`bbu.submit` appends to it; `bbu.status` and `bbu.submit logs|cancel|resume` read it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError, JobError
from bbu.jobs.launch import Submission
from bbu.jobs.request import Request, parse_request
from bbu.jobs.schedule import SCHEDULE_NAME, Schedule
from bbu.run.folder import RunFolder
from bbu.strict_json import JsonError, build_dataclass, parse_json


@dataclass(frozen=True)
class JobRecord:
    """One job of a run, or a schedule of evals: one line of `jobs.jsonl`."""

    name: str
    """`train`, `eval` and so on, or SCHEDULE_NAME."""
    ids: tuple[str, ...]
    """Slurm's job ids; empty for a job that ran on this machine, and for a schedule."""
    element: int | None
    """The run's own element of an array that serves several runs, else None."""
    runs: tuple[str, ...]
    """All run folders that the job serves, where it serves more than one."""
    folders: tuple[str, ...]
    """Folders of its logs, one for each id."""
    cluster: str
    """Name or path of the cluster profile it was submitted with."""
    cwd: str
    """The folder that it was submitted from; paths in configs are relative to it."""
    submitted: float
    """Seconds since the epoch."""
    request: Request | None = None
    """The request for this run alone: of a sweep, that of its point. None for a schedule."""
    schedule: Schedule | None = None
    """The schedule of a record with the name SCHEDULE_NAME."""


def job_record(
    submission: Submission, request: Request, element: int | None = None, runs: Sequence[str] = ()
) -> JobRecord:
    """The record of a submission made just now, from the current folder.

    Args:
        submission: the job, or one array of it.
        request: the request for the run whose record this is.
        element: the run's own element of an array that serves several runs.
        runs: all run folders that the job serves, where it serves more than one.
    """
    return JobRecord(
        name=submission.name,
        ids=submission.job_ids,
        element=element,
        runs=tuple(runs),
        folders=tuple(str(folder) for folder in submission.folders),
        cluster=request.cluster,
        cwd=str(Path.cwd()),
        submitted=time.time(),
        request=request,
    )


def schedule_record(schedule: Schedule, cluster: str) -> JobRecord:
    """The record of a schedule made just now, from the current folder."""
    return JobRecord(
        name=SCHEDULE_NAME,
        ids=(),
        element=None,
        runs=(),
        folders=(str(schedule.folder),),
        cluster=cluster,
        cwd=str(Path.cwd()),
        submitted=time.time(),
        schedule=schedule,
    )


def append_records(run: RunFolder, records: Iterable[JobRecord]) -> None:
    """Add to a run's records in one write, so that two writers do not mix; makes the run folder if needed."""
    run.root.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False, default=str) + "\n" for record in records)
    with run.jobs.open("a", encoding="utf-8") as file:
        file.write(lines)


def read_records(run: RunFolder) -> list[JobRecord]:
    """A run's records, oldest first; empty for a run without `jobs.jsonl`. Raises CheckpointError if it is damaged."""
    if not run.jobs.is_file():
        return []
    lines = run.jobs.read_bytes().split(b"\n")  # str.splitlines() would also split at U+2028 inside a text
    try:
        return [_read_record(parse_json(line)) for line in lines if line.strip()]
    except ValueError as error:  # JsonError, or an `argv` that is no command line
        raise CheckpointError(f"{run.jobs}: damaged ({error}); remove the line that is no job") from error


def newest_record(run: RunFolder, name: str) -> JobRecord:
    """The last record with that name. Raises JobError if the run has none."""
    records = [record for record in read_records(run) if record.name == name]
    if not records:
        raise JobError(
            f"{run.root}: no {name} job was submitted for it by bbu.submit; "
            "a job of an sbatch template is known to Slurm alone (squeue, scancel)"
        )
    return records[-1]


def _read_record(fields: Any) -> JobRecord:
    """One record from the JSON of its line, in today's form or in the first one."""
    if not isinstance(fields, dict) or "argv" not in fields:
        return build_dataclass(JobRecord, fields)
    argv = fields.pop("argv") or []
    if not isinstance(argv, list):
        raise JsonError("argv must be a list of words")
    return dataclasses.replace(build_dataclass(JobRecord, fields), **_read_argv(fields["name"], [*map(str, argv)]))


def _read_argv(name: str, words: Sequence[str]) -> dict[str, Any]:
    """The fields that stood in `argv` up to version 0.1: a command line, or a schedule's mode, minutes and folder."""
    if name != SCHEDULE_NAME:
        return {"request": parse_request(words)}
    mode, minutes, folder = words
    return {"schedule": Schedule(mode, int(minutes), Path(folder))}
