"""What a job is: its name, which the templates spell too, its arrays, and what could never run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.spec import job_kind, job_name
from tests.jobs.jobs import DONE, job

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"


def test_the_kind_of_a_job_is_read_back_from_its_name():
    assert job_name("train") == "bbu-train"
    assert job_kind(job_name("eval-0a1b")) == "eval-0a1b"
    assert job_kind("somebody-elses") is None


@pytest.mark.parametrize("template", [*sorted(path.name for path in TEMPLATES.glob("*.sbatch")), "eval.scron"])
def test_a_template_names_its_job_as_python_does(template: str):
    names = re.findall(r"^#.* --job-name=(\S+)", (TEMPLATES / template).read_text(), re.MULTILINE)
    assert names == [job_name(template.partition(".")[0])]


def test_an_array_too_big_for_the_site_becomes_several():
    whole = job(*(("print_words.py", str(n)) for n in range(45)))
    assert [len(part.commands) for part in whole.chunks(20)] == [20, 20, 5]
    assert [command for part in whole.chunks(20) for command in part.commands] == list(whole.commands)


@pytest.mark.parametrize(("commands", "nodes"), [((DONE,), 0), ((), 1)])
def test_a_job_that_could_never_run_is_refused(commands: tuple[tuple[str, ...], ...], nodes: int):
    with pytest.raises(JobError):
        job(*commands, nodes=nodes)
