"""The second test cluster, `newer`: what sets Slurm 24.11 without accounting apart from the first one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import testbed
from tests.cluster.testbed import Cluster
from tests.cluster.user import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def minutely(newer: Cluster) -> Iterator[Path]:
    """The file to which a crontab entry adds a line each minute. Installed first: the minute passes meanwhile."""
    written = newer.shared / "minutely.txt"
    tab = newer.shared / "crontab"
    options = "--job-name=minutely --time=1 --open-mode=append --output=/dev/null"
    tab.write_text(f"#SCRON {options}\n* * * * * echo $(id -un) $(sbatch --version) >>{written}\n")
    newer.run(["scrontab", tab])
    yield written
    newer.run(["scrontab", "-r"])


def test_it_is_slurm_24_11(newer: Cluster) -> None:
    assert newer.run("sbatch --version").stdout.startswith("slurm-wlm 24.11.")
    running = newer.run("scontrol show config | grep SLURM_VERSION").stdout
    assert running.split()[-1].startswith("24.11.")


def test_two_nodes_are_up(newer: Cluster) -> None:
    nodes = newer.run(["sinfo", "-h", "-N", "-p", "cpu", "-o", "%N %P"]).stdout.splitlines()
    assert nodes == ["m1 cpu*", "m2 cpu*"]


def test_up_is_idempotent(newer: Cluster) -> None:
    assert "already running" in testbed.script("up.sh", "newer")


def test_a_step_runs_on_both_nodes_as_the_ordinary_user(newer: Cluster) -> None:
    text = newer.run("srun -N2 --ntasks-per-node=1 sh -c 'echo $SLURMD_NODENAME $(id -un)'").stdout
    assert sorted(text.splitlines()) == ["m1 bbu", "m2 bbu"]


def test_jobs_run_in_the_hosts_userland(newer: Cluster) -> None:
    line = "command -v python3 && command -v apptainer && getconf GNU_LIBC_VERSION"
    assert newer.run(["srun", "sh", "-c", line]).stdout == newer.run(line).stdout


def test_it_is_another_cluster_than_the_first(newer: Cluster, cluster: Cluster) -> None:
    job = newer.sbatch("--hold", "--job-name=only-on-newer", "--wrap", "true")
    assert "only-on-newer" not in cluster.run("squeue -h -o %j").stdout
    newer.run(["scancel", job])
    assert newer.wait(job) == "CANCELLED"


def test_there_is_no_accounting(newer: Cluster) -> None:
    done = newer.run("sacct", check=False)
    assert done.returncode == 1 and "accounting storage is disabled" in done.stderr


def test_a_finished_job_is_remembered_all_the_same(newer: Cluster) -> None:
    job = newer.sbatch("--output=/dev/null", "--wrap", "exit 7")
    assert newer.wait(job) == "FAILED"
    assert "ExitCode=7:0" in newer.run(["scontrol", "show", "job", job]).stdout


def test_a_requeued_job_starts_again_within_seconds(newer: Cluster) -> None:
    assert newer.starts_of_a_requeued_job(timeout=45) == ["restarts 0", "restarts 1"]


def test_an_array_reaches_to_index_20_and_no_further(newer: Cluster) -> None:
    job = newer.sbatch("--hold", "--array=0-20", "--wrap", "true")
    newer.run(["scancel", job])
    refused = newer.run("sbatch --hold --array=0-21 --wrap true", check=False)
    assert refused.returncode != 0 and "Invalid job array specification" in refused.stderr


def test_the_container_enters(newer: Cluster) -> None:
    checkout = newer.checkout()
    program = checkout / "tests/cluster/programs/print_torch.py"
    line = f"srun -N2 --ntasks-per-node=1 {checkout}/slurm/container.sh python {program}"
    lines = newer.run(line, env={"BBU_IMAGE": str(newer.image), "BBU_HOME": str(checkout)}).stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]


def test_a_crontab_entry_is_a_pending_job_that_runs_each_minute(newer: Cluster, minutely: Path) -> None:
    wait_until(lambda: minutely.is_file() and minutely.read_text().endswith("\n"), 75, lambda: f"no line in {minutely}")
    assert minutely.read_text().splitlines()[0].startswith("bbu slurm-wlm 24.11.")
    queued = newer.run("squeue -h -n minutely -o '%j %T'").stdout
    assert queued in {"minutely PENDING\n", "minutely RUNNING\n", "minutely COMPLETING\n"}


def test_an_entry_is_gone_once_it_is_removed(newer: Cluster) -> None:
    newer.run("scrontab -r")
    assert newer.run("squeue -h -n minutely -t PENDING").stdout == ""
    assert newer.run("scrontab -l", check=False).stdout == "no crontab for bbu\n"
