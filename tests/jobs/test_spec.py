"""Names of jobs: spelled in one place for Python, and the templates agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bbu.jobs.spec import job_kind, job_name

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"


def test_the_kind_of_a_job_is_read_back_from_its_name():
    assert job_name("train") == "bbu-train"
    assert job_kind(job_name("eval-0a1b")) == "eval-0a1b"
    assert job_kind("somebody-elses") is None


@pytest.mark.parametrize("template", [*sorted(path.name for path in TEMPLATES.glob("*.sbatch")), "eval.scron"])
def test_a_template_names_its_job_as_python_does(template: str):
    names = re.findall(r"^#.* --job-name=(\S+)", (TEMPLATES / template).read_text(), re.MULTILINE)
    assert names == [job_name(template.partition(".")[0])]
