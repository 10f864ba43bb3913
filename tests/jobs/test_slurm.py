"""What sbatch is asked for: from a job and a profile to the options of Slurm."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import load_profile
from bbu.jobs.slurm import _slurm_parameters, sbatch_options
from bbu.jobs.submission import submit_jobs
from tests.jobs.jobs import CHECKOUT, DONE, job


def parameters(**changes: object) -> dict[str, Any]:
    """Of a job of two nodes that requests `changes` besides what the profile of the example states for training."""
    profile = load_profile("example")
    spec = dataclasses.replace(job(DONE, nodes=2), resources=dataclasses.replace(profile.train, **changes))
    return _slurm_parameters(spec, profile, ("7", "8"))


def test_slurm_is_asked_for_what_profile_and_job_state():
    options = parameters()
    assert (options["nodes"], options["partition"], options["account"]) == (2, "gpu", "my-project")
    assert options["dependency"] == "afterok:7:8"
    assert options["signal_delay_s"] == 600 and options["exclusive"] is True
    assert "qos" not in options and "nice" not in options["additional_parameters"]
    assert {"--cpus-per-task=8", "--kill-on-bad-exit=1"} <= set(options["srun_args"])


@pytest.mark.parametrize(
    ("memory", "option"),
    [
        ("512G", ("mem", "512G")),
        ("all", ("mem", "0")),
        ("8G per cpu", ("mem-per-cpu", "8G")),
        ("64G per gpu", ("mem-per-gpu", "64G")),
    ],
)
def test_memory_is_requested_per_node_cpu_or_gpu(memory: str, option: tuple[str, str]):
    assert option in parameters(memory=memory)["additional_parameters"].items()


def test_gpus_are_requested_per_node_by_either_name_and_never_per_task():
    resources = dataclasses.replace(load_profile("example").train, gpu_type="a100")
    assert sbatch_options(resources, "gpus-per-node").count("--gpus-per-node=a100:8") == 1
    assert sbatch_options(resources, "gres").count("--gres=gpu:a100:8") == 1
    assert not [option for option in sbatch_options(resources, "gres") if "per-task=a100" in option]


def test_a_job_with_after_any_waits_for_the_end_and_not_for_success():
    spec = dataclasses.replace(job(DONE), after_any=True)
    assert _slurm_parameters(spec, load_profile("example"), ("7",))["dependency"] == "afterany:7"


def test_a_slurm_profile_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JobError, match="--cluster local"):
        submit_jobs((job(DONE),), load_profile("example"), CHECKOUT, print)
