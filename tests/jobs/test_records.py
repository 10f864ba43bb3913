"""`jobs.jsonl`: records come back as they were written, by this version and by the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbu.errors import CheckpointError, JobError
from bbu.jobs.control import training_to_resume
from bbu.jobs.records import append_records, newest_record, read_records, schedule_record
from bbu.jobs.request import Request, parse_request
from bbu.jobs.schedule import Schedule
from bbu.run.folder import RunFolder
from tests.conftest import SlurmSays

FIRST_FORM = {"ids": [], "element": None, "runs": [], "folders": ["/old/jobs/1"], "cluster": "site", "cwd": "/old",
              "submitted": 1795618829.1}  # fmt: skip
"""The fields of a record of version 0.1, besides its name and `argv`."""
FIRST_ARGV = ["train", "--nodes", "2", "--gpus-per-node", "4", "--cluster", "site", "--config", "base_flat_v2",
              "--use-new-config", "--set", "seed=7", "--set", "run_name=a b"]  # fmt: skip


def write_first_form(run: RunFolder, name: str, argv: list[str]) -> None:
    run.jobs.write_text(json.dumps({"name": name, **FIRST_FORM, "argv": argv}) + "\n")


def test_records_come_back_as_they_were_written(run: RunFolder):
    [record] = read_records(run)
    assert (record.name, record.ids, record.cwd) == ("train", ("7",), str(Path.cwd()))
    assert record.request == parse_request(["--nodes", "2", "--config", "smoke", "--cluster", "test"])
    assert newest_record(run, "train") == record
    with pytest.raises(JobError, match="no eval job was submitted"):
        newest_record(run, "eval")


def test_a_schedule_comes_back_from_the_records(run: RunFolder):
    schedule = Schedule("resubmit", 30, Path("/jobs/schedule"))
    append_records(run, [schedule_record(schedule, "test")])
    assert newest_record(run, "eval-schedule").schedule == schedule


def test_a_command_line_of_the_first_form_is_read_as_its_request(run: RunFolder):
    write_first_form(run, "train", FIRST_ARGV)
    [record] = read_records(run)
    assert record.request == Request(
        job="train", nodes=2, gpus_per_node=4, cluster="site", config="base_flat_v2", use_new_config=True,
        overrides=("seed=7", "run_name=a b"),
    )  # fmt: skip
    assert (record.folders, record.cwd) == (("/old/jobs/1",), "/old")


def test_a_schedule_of_the_first_form_is_read_as_one(run: RunFolder):
    write_first_form(run, "eval-schedule", ["resubmit", "30", "/old/jobs/schedule"])
    [record] = read_records(run)
    assert (record.schedule, record.request) == (Schedule("resubmit", 30, Path("/old/jobs/schedule")), None)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_with_a_record_of_the_first_form_is_resumed(run: RunFolder, slurm_says: SlurmSays, begun: bool):
    write_first_form(run, "train", FIRST_ARGV)
    slurm_says("squeue", "")
    if not begun:
        run.config.unlink()
    request, folder = training_to_resume(run)
    place = FIRST_ARGV.index("--config")
    expected = [*FIRST_ARGV[:place], "--config", str(run.config)] if begun else FIRST_ARGV
    assert (list(request.resume_command()), folder) == (expected, Path("/old"))


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "train"}', '{"name": "train", "argv": ["--no-such-option"]}'])
def test_a_damaged_record_is_refused_with_its_file(run: RunFolder, line: str):
    run.jobs.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"jobs\.jsonl: damaged"):
        read_records(run)
