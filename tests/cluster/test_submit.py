"""bbu.jobs and the sbatch templates on real Slurm, in the real image, as an ordinary user."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

pytestmark = pytest.mark.cluster

Command = tuple[str, ...]
SAVE_ONCE = ("tests/cluster/programs/save_once.py",)


@pytest.fixture(scope="module")
def user(cluster: Cluster) -> User:
    return User(cluster)


def leave_with(code: int) -> Command:
    return ("tests/jobs/programs/leave.py", str(code))


def job(name: str, *commands: Command, nodes: int = 1, after: tuple[str, ...] = ()) -> dict[str, Any]:
    """A job whose elements run these commands of Python."""
    return {"name": name, "nodes": nodes, "commands": commands, "after": after}


def output_in(logs: Path) -> str:
    return "".join(file.read_text() for file in sorted(logs.glob("*.out")))


def template(user: User, name: str, *command: str) -> str:
    """Write an sbatch template that runs a command of Python; its name."""
    path = user.checkout / f"{name}.sbatch"
    path.write_text(f"#!/bin/bash\n. slurm/job.sh\nrun_tasks python {' '.join(command)}\n")
    return path.name


def places_after_restart(text: str) -> set[str]:
    """Rank, number of ranks, local rank and master address of each rank of the second start."""
    return set(re.findall(r"^start 1 (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_signalled_job_saves_on_every_rank_is_requeued_and_resumes(user: User, signal: str) -> None:
    [(job_id, logs)] = user.submit_specs(job("train", SAVE_ONCE, nodes=2))
    wait_until(lambda: output_in(logs).count("start 0") == 2, 60, lambda: output_in(logs))
    user.cluster.run(["scancel", f"--signal={signal}", job_id])
    assert user.cluster.wait(job_id, timeout=120) == "COMPLETED", output_in(logs)
    text = output_in(logs)
    assert text.count("saved\n") == 2 and "requeued (restart 1 of 3)" in text, text
    assert {"0 2 0 n1", "1 2 0 n1"} <= places_after_restart(text), text


def test_an_exit_code_reaches_slurm_unchanged(user: User) -> None:
    [(job_id, logs)] = user.submit_specs(job("fails", leave_with(7)))
    assert user.cluster.wait(job_id) == "FAILED", output_in(logs)
    assert "ExitCode=7:0" in user.cluster.show(job_id)


def test_jobs_run_in_the_order_of_their_dependencies(user: User) -> None:
    shards = "tests/cluster/programs/shards.py"
    array = job("convert", *((shards, "write", str(n)) for n in range(3)))
    merge = job("merge", (shards, "list"), after=("convert",))
    _, (job_id, logs) = user.submit_specs(array, merge)
    assert user.cluster.wait(job_id) == "COMPLETED", output_in(logs)
    assert "['shard-0', 'shard-1', 'shard-2']" in output_in(logs)


def test_a_job_after_a_failed_one_never_begins(user: User) -> None:
    _, (job_id, logs) = user.submit_specs(job("first", leave_with(3)), job("second", leave_with(0), after=("first",)))
    assert user.cluster.wait(job_id) == "CANCELLED"
    assert output_in(logs) == ""


def test_the_training_template_enters_the_image_with_its_arguments(user: User) -> None:
    job_id = user.sbatch("-N2", "slurm/train.sbatch", "--config", "smoke", "--print-config")
    assert user.cluster.wait(job_id) == "COMPLETED", user.cluster.describe(job_id)
    assert "run_name: smoke" in user.cluster.job_output(job_id)


def test_a_template_passes_an_error_code_through(user: User) -> None:
    job_id = user.sbatch("slurm/train.sbatch", "--config", "no_such")
    assert user.cluster.wait(job_id) == "FAILED"
    assert "ExitCode=2:0" in user.cluster.show(job_id)
    assert "no_such" in user.cluster.job_output(job_id)


def test_a_template_requeues_what_saved_its_state(user: User) -> None:
    job_id = user.sbatch("-N2", "--requeue", "--open-mode=append", template(user, "saves", *SAVE_ONCE))
    wait_until(lambda: user.cluster.job_output(job_id).count("start 0") == 2, 60, lambda: user.cluster.describe(job_id))
    user.cluster.run(["scancel", "--signal=USR2", job_id])
    assert user.cluster.wait(job_id, timeout=120) == "COMPLETED", user.cluster.describe(job_id)
    text = user.cluster.job_output(job_id)
    assert text.count("saved\n") == 2 and {"0 2 0 n1", "1 2 0 n1"} <= places_after_restart(text), text


@pytest.mark.parametrize("cap", [0, 1])
def test_the_cap_that_a_templates_command_states_ends_the_row_of_requeues(user: User, cap: int) -> None:
    """The command states it inside the container, as the trainer does with max_requeues of its config.

    With one rank: srun sends TERM to the others when rank 0 leaves with 75, and this program does not handle it.
    """
    script = template(user, f"capped-{cap}", *leave_with(75), str(cap))
    job_id = user.sbatch("-N1", "--requeue", "--open-mode=append", script)
    assert user.cluster.wait(job_id, timeout=120) == "FAILED", user.cluster.describe(job_id)
    shown, text = user.cluster.show(job_id), user.cluster.job_output(job_id)
    assert "ExitCode=75:0" in shown and f"Restarts={cap} " in shown, shown
    assert text.count("and is requeued") == cap and f"was restarted {cap} times, the most allowed" in text, text


@pytest.mark.parametrize("request_by", ["gpus-per-node", "gres"])
def test_gpus_memory_and_whole_nodes_are_requested_as_the_profile_says(user: User, request_by: str) -> None:
    """These nodes have two GPUs each, in name only."""
    requested = {"gpus_per_node": 2, "exclusive": True, "memory": "1G per cpu", "nice": 50}
    profile = user.profile(f"gpus-{request_by}", gpu_request=request_by, train=requested)
    gpus = job("gpus", ("tests/cluster/programs/print_gpus.py",), nodes=2) | {"tasks_per_node": 2}
    [(job_id, logs)] = user.submit_specs(gpus, profile=profile)
    assert user.cluster.wait(job_id) == "COMPLETED", output_in(logs)
    assert sorted(re.findall(r"rank \d of 2 GPUs", output_in(logs))) == [f"rank {n} of 2 GPUs" for n in range(4)]
    shown = user.cluster.show(job_id)
    assert "MinMemoryCPU=1G" in shown and "OverSubscribe=NO" in shown and "Nice=50" in shown and "gpu:2" in shown, shown
