"""`jobs.jsonl` of a run folder: which jobs were submitted for the run, and with what command line.

Appended to by whoever submits, read by `bbu.status` and by `bbu.submit logs|cancel|resume`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError, JobError
from bbu.jobs.launch import Submission
from bbu.run.folder import RunFolder

SCHEDULE = "eval-schedule"
"""Name of the record of evals that come again; its `argv` is how it is kept and how often."""


@dataclass(frozen=True)
class JobRecord:
    """One job of a run. ids: Slurm's, none for a job that ran here. element: the run's own in an array that serves
    several runs, else None. runs: all the run folders that it serves, where those are several. folders: where its
    logs lie, one for each id. argv: the command line of bbu.submit that trains the run, from the folder `cwd`; of a
    schedule, how it is kept. submitted: seconds since the epoch.
    """

    name: str
    ids: tuple[str, ...]
    element: int | None
    runs: tuple[str, ...]
    folders: tuple[str, ...]
    cluster: str
    argv: tuple[str, ...]
    cwd: str
    submitted: float

    @property
    def is_schedule(self) -> bool:
        return self.name == SCHEDULE


def record_of(
    done: Submission, cluster: str, argv: Sequence[str], element: int | None = None, runs: Sequence[str] = ()
) -> JobRecord:
    """What to remember of a submission made just now, from the current folder."""
    folders = tuple(str(folder) for folder in done.folders)
    return JobRecord(
        name=done.name,
        ids=done.job_ids,
        element=element,
        runs=tuple(runs),
        folders=folders,
        cluster=cluster,
        argv=tuple(argv),
        cwd=str(Path.cwd()),
        submitted=time.time(),
    )


def remember(run: RunFolder, records: Iterable[JobRecord]) -> None:
    """Add to a run's records, making its folder if this is its first job. One write: appends do not mix."""
    run.root.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    with run.jobs.open("a", encoding="utf-8") as file:
        file.write(lines)


def remembered(run: RunFolder) -> list[JobRecord]:
    """A run's records, oldest first; none for a run that was never submitted from here."""
    if not run.jobs.is_file():
        return []
    lines = run.jobs.read_text(encoding="utf-8").splitlines()
    try:
        return [read_record(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run.jobs}: damaged ({error}); remove the line that is no job") from error


def read_record(fields: dict[str, Any]) -> JobRecord:
    lists: dict[str, Any] = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return JobRecord(**fields | lists)


def newest(run: RunFolder, name: str) -> JobRecord:
    """The last record of that name. Raises JobError if the run has none."""
    found = [record for record in remembered(run) if record.name == name]
    if not found:
        raise JobError(
            f"{run.root}: no {name} job was submitted for it by bbu.submit; "
            "a job of an sbatch template is known to Slurm alone (squeue, scancel)"
        )
    return found[-1]
