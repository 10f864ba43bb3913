"""Submitting several jobs at once: their order, and a dry run. Single commands of bbu.submit: test_submit.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import load_profile
from bbu.jobs.submission import dry_run_text, submit_jobs
from tests.jobs.jobs import CHECKOUT, DONE, job


def test_a_dry_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run_text((job(DONE), job(DONE, name="next", after=("work",))), load_profile("local"), CHECKOUT)
    assert "### next: 1 tasks on this machine, after work" in text
    assert not list(tmp_path.iterdir())


def test_a_job_cannot_wait_for_one_that_does_not_come_before_it():
    with pytest.raises(JobError, match="does not come before it"):
        submit_jobs((job(DONE, after=("later",)),), load_profile("local"), CHECKOUT, print)
