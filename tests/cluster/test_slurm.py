"""The test cluster itself: what every other cluster test takes for granted."""

from __future__ import annotations

import subprocess

import pytest

from tests.cluster import testbed
from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.cluster


def test_two_nodes_are_up(cluster: Cluster) -> None:
    nodes = cluster.run(["sinfo", "-h", "-N", "-p", "cpu", "-o", "%N %P"]).stdout.split("\n")
    assert sorted(filter(None, nodes)) == ["n1 cpu*", "n2 cpu*"]


def test_up_is_idempotent(cluster: Cluster) -> None:
    assert "already running" in testbed.script("up.sh")


def test_a_step_runs_on_both_nodes_as_the_ordinary_user(cluster: Cluster) -> None:
    text = cluster.run("srun -N2 --ntasks-per-node=1 sh -c 'echo $SLURMD_NODENAME $(id -un)'").stdout
    assert sorted(text.splitlines()) == ["n1 bbu", "n2 bbu"]


def test_accounting_remembers_a_job_and_its_exit_code(cluster: Cluster) -> None:
    job = cluster.sbatch("--wrap", "exit 7")
    assert cluster.wait(job) == "FAILED"
    # accounting lags the controller by a second or so
    line = f"until sacct -j {job} -XnPo State,ExitCode | grep -qx 'FAILED|7:0'; do sleep 0.2; done"
    cluster.run(line, timeout=30)


def test_a_requeued_job_starts_again_within_seconds(cluster: Cluster) -> None:
    assert cluster.starts_of_a_requeued_job(timeout=90) == ["restarts 0", "restarts 1"]


def test_gpus_can_be_requested_by_number(cluster: Cluster) -> None:
    line = "srun -N2 --gpus-per-node=2 --ntasks-per-node=2 sh -c 'echo $SLURM_GPUS_ON_NODE'"
    text = cluster.run(line).stdout
    assert text.split() == ["2"] * 4


def test_the_login_python_has_no_torch(cluster: Cluster) -> None:
    program = cluster.checkout() / "tests/cluster/programs/import_modules.py"
    cluster.run([cluster.python, program, "submitit", "yaml", "numpy"])
    assert cluster.run([cluster.python, program, "torch"], check=False).returncode == 1


def test_apptainer_runs_the_image_as_the_user(cluster: Cluster) -> None:
    checkout = cluster.checkout()
    program = checkout / "tests/cluster/programs/print_torch.py"
    done = cluster.run(["apptainer", "exec", "--bind", checkout, cluster.image, "python", program])
    uid = subprocess.check_output(["id", "-u", cluster.user], text=True)
    assert done.stdout.split()[-1] == uid.strip()
