"""slurm/container.sh under real Slurm, in the real image: codes, environment, and the stop signals."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def home(cluster: Cluster) -> Path:
    return cluster.checkout()


@pytest.fixture
def env(cluster: Cluster, home: Path) -> dict[str, str]:
    return {"BBU_IMAGE": str(cluster.image), "BBU_HOME": str(home)}


def enter(home: Path, command: str) -> str:
    return f"srun -N2 --ntasks-per-node=1 {home}/slurm/container.sh {command}"


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_commands_exit_code_comes_back_through_srun(cluster: Cluster, home: Path, env: dict, code: int) -> None:
    done = cluster.run(enter(home, f"python -c 'raise SystemExit({code})'"), env=env, check=False)
    assert done.returncode == code, done.stderr


def test_a_killed_command_gives_128_and_its_signal(cluster: Cluster, home: Path, env: dict) -> None:
    line = f"{home}/slurm/container.sh python -c 'import os; os.kill(os.getpid(), 9)'"
    assert cluster.run(line, env=env, check=False).returncode == 128 + 9


def test_the_inside_sees_slurm_the_folder_and_the_checkout(cluster: Cluster, home: Path, env: dict) -> None:
    line = "bash -c 'echo $SLURM_PROCID $PWD $PYTHONPATH $HF_HUB_OFFLINE'"
    told = cluster.run(enter(home, line), env=env, cwd=home).stdout.splitlines()
    assert sorted(told) == [f"{rank} {home} {home} 1" for rank in (0, 1)]


def test_standard_input_reaches_the_command(cluster: Cluster, home: Path, env: dict) -> None:
    assert cluster.run(f"echo hello | {home}/slurm/container.sh cat", env=env).stdout == "hello\n"


def test_extra_folders_are_bound(cluster: Cluster, home: Path, env: dict) -> None:
    cluster.run(f"mkdir -p {home}/extra && touch {home}/extra/file")
    told = cluster.run(f"{home}/slurm/container.sh ls /data", env=env | {"BBU_BINDS": f"{home}/extra:/data"})
    assert told.stdout == "file\n"


def mounted() -> set[str]:
    """Our own mounts of images; a job that another test had killed may have left one."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if "bbu-image" in line}


def test_nothing_stays_mounted(cluster: Cluster, home: Path, env: dict) -> None:
    before = mounted()
    cluster.run(f"{home}/slurm/container.sh false", env=env, check=False)
    assert mounted() <= before


def test_a_dead_mount_of_a_killed_job_is_swept_up_by_the_next(cluster: Cluster, home: Path, env: dict) -> None:
    before = mounted()
    killed = f"setsid {home}/slurm/container.sh python -c 'import os; os.killpg(0, 9)'"
    cluster.run(killed, env=env, check=False)
    assert mounted() > before
    cluster.run(f"{home}/slurm/container.sh true", env=env)
    assert mounted() <= before


def survivors(cluster: Cluster, home: Path, env: dict, signal: str) -> str:
    """Start a program on both nodes that catches stop signals, send one to the step; the job's output."""
    line = enter(home, f"python {home}/tests/cluster/programs/survivor.py")
    job = cluster.sbatch("-N2", "--wrap", f"{line}; echo code $?", cwd=home, env=env)
    wait_for_output(cluster, job, "ready", times=2)
    cluster.run(["scancel", f"--signal={signal}", f"{job}.0"])
    cluster.wait(job)
    return cluster.job_output(job)


def wait_for_output(cluster: Cluster, job: str, text: str, times: int) -> None:
    deadline = time.monotonic() + 60
    while cluster.job_output(job).count(text) < times:
        assert time.monotonic() < deadline, cluster.describe(job)
        time.sleep(0.3)


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_signalled_program_can_save_and_hand_back_its_code(
    cluster: Cluster, home: Path, env: dict, signal: str
) -> None:
    output = survivors(cluster, home, env, signal)
    assert output.count(f"saved after SIG{signal}") == 2, output
    assert "code 75" in output, output


def test_without_the_shield_the_image_vanishes_under_the_program(cluster: Cluster, home: Path, env: dict) -> None:
    output = survivors(cluster, home, env | {"BBU_SHIELD": "off"}, "USR2")
    assert "saved" not in output, output
    assert "code 135" in output, output  # 128 + SIGBUS
