"""Submitting several jobs at once: their order, and a dry run. Single commands of bbu.submit: test_submit.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import load_profile
from bbu.jobs.launch import Submission
from bbu.jobs.records import read_records
from bbu.jobs.request import parse_request
from bbu.jobs.submission import dry_run_text, submit_jobs, submit_request
from bbu.run.folder import RunFolder
from tests.jobs.jobs import CHECKOUT, DONE, job


def test_a_dry_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run_text((job(DONE), job(DONE, name="next", after=("work",))), load_profile("local"), CHECKOUT)
    assert "### next: 1 tasks on this machine, after work" in text
    assert not list(tmp_path.iterdir())


def test_a_job_cannot_wait_for_one_that_does_not_come_before_it():
    with pytest.raises(JobError, match="does not come before it"):
        submit_jobs((job(DONE, after=("later",)),), load_profile("local"), CHECKOUT, print)


def test_each_run_of_a_sweep_records_its_own_element_and_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the comparison, which serves both runs, each records that; here Slurm is a function that accepts all."""
    monkeypatch.chdir(tmp_path)

    def accept(specs, profile, checkout, notify, note):
        submissions = [Submission("train", ("9",), (tmp_path,), None, 0, 2), Submission("compare", ("10",), (), None)]
        for submission in submissions:
            note(submission)
        return submissions

    monkeypatch.setattr("bbu.jobs.submission.submit_jobs", accept)
    sweep = parse_request(["--config", "smoke", "--cluster", "local", "--sweep", "seed=1,2"])
    assert submit_request(sweep, print) == 0
    roots = [str(tmp_path / f"output-smoke.seed-{seed}") for seed in (1, 2)]
    for index, root in enumerate(roots):
        train, compare = read_records(RunFolder(Path(root)))
        assert (train.ids, train.element, train.runs) == (("9",), index, ())
        assert train.request == sweep.at_point((f"seed={index + 1}",), "smoke")
        assert (compare.ids, compare.element, list(compare.runs)) == (("10",), None, roots)
