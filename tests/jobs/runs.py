"""Run folders as bbu.submit and a trainer leave them, and what squeue prints about their jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bbu.jobs.launch import Submission
from bbu.jobs.records import JobRecord, job_record
from bbu.jobs.request import parse_request
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus

TRAINING = RunStatus(
    phase="training", step=30, max_steps=120, seconds_left=3725.0, loss=0.51234, samples_per_second=8.25, pid=4711,
    host="here", stale_after_s=60.0, job={"SLURM_JOB_ID": "7"},
)  # fmt: skip
"""The status of a run that job 7 trains."""
KINDS = {"8": "eval", "20": "compare"}
"""Kinds of jobs by their ids; all other jobs train."""


def record_of_job(name: str, job: str, folder: Path, element: int | None = None, runs: Sequence[str] = ()) -> JobRecord:
    """The record of a job in Slurm whose logs lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    request = parse_request(["--nodes", "2", "--config", "smoke", "--cluster", "test"])
    return job_record(Submission(name, (job,), (folder,), None), request, element, runs)


def squeue_text(*lines: str) -> str:
    """What squeue prints for `7 RUNNING`, `7_1 PENDING Priority`, `7 FAILED NonZeroExitCode 6:0`: one restart each."""
    rows = []
    for words in (line.split() for line in lines):
        job, state, reason, code = words + ["", "", "None", "0:0"][len(words) :]
        array, _, element = job.partition("_")
        name = f"bbu-{KINDS.get(array, 'train')}"
        rows.append(f"{array}|{element or 'N/A'}|{state}|{reason}|1|{code}|{name}|{array}|\n")
    return "".join(rows)


def write_score(run: RunFolder, step: int, source: str, f1: float | None, **facts: str) -> None:
    """Give a run a score, as bbu.eval writes it, with some facts of its evaluation."""
    folder = run.eval / f"checkpoint-{step}" / f"{source}-abc"
    folder.mkdir(parents=True)
    headline = {"precision": 0.5, "recall": 0.5, "f1": f1, "iou": 0.5}
    (folder / "metrics.json").write_text(json.dumps({"step": step, "headline": headline} | facts))
