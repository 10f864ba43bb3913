"""What every way of running a job shares: the command line and variables of a task, and the parts of a cut array."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bbu.jobs.clusters import load_profile
from bbu.jobs.launch import Submission, job_environment, new_folder, task_command
from tests.jobs.jobs import CHECKOUT, DONE, job


@pytest.mark.parametrize(("image", "python"), [("/image.sif", "python"), (None, sys.executable)])
def test_a_task_runs_the_images_python_or_this_one(image: str | None, python: str):
    command = task_command(CHECKOUT, image, ("-m", "bbu.train"))
    assert command == ("bash", f"{CHECKOUT}/slurm/task.sh", python, "-m", "bbu.train")


def test_the_tasks_of_a_job_share_the_sites_variables_and_the_jobs_own():
    spec = job(DONE)
    environment = job_environment(spec, load_profile("example"), CHECKOUT)
    assert environment["BBU_HOME"] == str(CHECKOUT) and environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert environment["BBU_MAX_REQUEUES"] == str(spec.max_requeues) and environment["NCCL_DEBUG"] == "WARN"


def test_a_folder_of_logs_is_new_and_kept_out_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    profile = load_profile("local")
    first, second = new_folder("train", profile), new_folder("train", profile)
    assert first != second and first.parent == second.parent == tmp_path / "jobs"
    assert (tmp_path / "jobs/.gitignore").read_text() == "*\n"


def test_an_element_is_found_in_its_part_of_a_cut_array():
    first, second, last = (
        Submission("train", (str(n),), (), None, 20 * n, size) for n, size in ((0, 20), (1, 20), (2, 1))
    )
    assert [part.has(20) for part in (first, second, last)] == [False, True, False]
    assert (first.element(19), second.element(20), last.element(40)) == (19, 0, None)
