"""A task: its rank, its address, and how its end is told. The children here are real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbu.errors import JobError
from bbu.jobs.task import FIRST_PORT, PORTS, distributed_env, expand_nodes, master_port

ROOT = Path(__file__).resolve().parents[2]
EPHEMERAL = 32_768
SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[1-2,5],m3", ["n1", "n2", "n5", "m3"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("a-b.site.org,c_1", ["a-b.site.org", "c_1"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
    ],
)
def test_a_node_list_is_read_as_slurm_reads_it(text: str, nodes: list[str]):
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", "n[1-2", "n[a]", "n[1-]", "n1;rm", "n[1--2]", ","])
def test_what_is_no_node_list_is_refused(text: str):
    with pytest.raises(JobError):
        expand_nodes(text)


def test_a_rank_learns_its_place_from_slurm():
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "20041"}
    assert distributed_env(SLURM, "-ib") == expected


def test_a_step_on_part_of_the_job_has_its_own_first_node_and_size():
    env = distributed_env(SLURM | {"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_TASKS": "2"})
    assert (env["MASTER_ADDR"], env["WORLD_SIZE"]) == ("gpu08", "2")


def test_outside_of_a_job_there_is_no_rank():
    with pytest.raises(JobError, match="srun or submitit"):
        distributed_env({})


@given(st.integers(1, 10**9), st.integers(0, 1000))
def test_the_port_stays_below_the_ephemeral_ones_and_changes_with_job_and_restart(job: int, restarts: int):
    port = master_port(job, restarts)
    assert FIRST_PORT <= port < FIRST_PORT + PORTS < EPHEMERAL
    assert port != master_port(job + 1, restarts) and port != master_port(job, restarts + 1)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of rank 0 of a Slurm job, with an `scontrol` that notes how it was called."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/called\nexit ${{SCONTROL_CODE:-0}}\n')
    program.chmod(0o755)
    return os.environ | SLURM | {"SLURM_PROCID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def start(environ: dict[str, str], child: str, max_restarts: int = 1) -> subprocess.Popen[str]:
    """Call a ContainerTask, as submitit would, in a process of its own; `child` is its Python program."""
    program = f"""
import signal, sys
from pathlib import Path
from bbu.jobs.task import ContainerTask
signal.signal(signal.SIGUSR2, lambda *a: sys.exit("submitit's handler ran"))
task = ContainerTask(("-c", {child!r}), Path({str(ROOT)!r}), None, {{}}, {max_restarts}, "", 1)
print("returned", task(), flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environ, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ending(environ: dict[str, str], child: str, max_restarts: int = 1) -> tuple[int, str, str]:
    process = start(environ, child, max_restarts)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("code", [0, 1, 7, 137])
def test_under_slurm_a_code_passes_through_unchanged(slurm: dict[str, str], code: int):
    assert ending(slurm, f"raise SystemExit({code})")[0] == code


def test_a_child_killed_by_a_signal_gives_a_shells_code(slurm: dict[str, str]):
    assert ending(slurm, "import os; os.kill(os.getpid(), 9)")[0] == 137


def test_rank_0_requeues_a_job_that_saved_its_state(slurm: dict[str, str], tmp_path: Path):
    code, out, err = ending(slurm, "raise SystemExit(75)")
    assert (code, out) == (0, "returned 75\n")
    assert (tmp_path / "called").read_text() == "requeue 41\n" and "requeued (restart 1 of 1)" in err


def test_the_other_ranks_just_return(slurm: dict[str, str], tmp_path: Path):
    assert ending(slurm | {"SLURM_PROCID": "1"}, "raise SystemExit(75)")[:2] == (0, "returned 75\n")
    assert not (tmp_path / "called").exists()


def test_the_cap_ends_a_job_that_was_restarted_often_enough(slurm: dict[str, str], tmp_path: Path):
    code, _, err = ending(slurm | {"SLURM_RESTART_COUNT": "1"}, "raise SystemExit(75)")
    assert code == 75 and "the most allowed" in err and not (tmp_path / "called").exists()


def test_a_refused_requeue_is_told(slurm: dict[str, str]):
    code, _, err = ending(slurm | {"SCONTROL_CODE": "1"}, "raise SystemExit(75)")
    assert code == 75 and "scontrol requeue 41 failed" in err


CATCHER = """
import signal, sys, time
def stop(number, frame):
    print("caught", signal.Signals(number).name, flush=True); time.sleep(0.3); sys.exit(5)
for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM): signal.signal(name, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_under_slurm_the_child_gets_the_steps_signal_and_the_task_waits_for_it(slurm: dict[str, str], name: str):
    process = start(slurm, CATCHER)
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.Signals[f"SIG{name}"])  # as Slurm does: every process of the step
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, f"caught SIG{name}\n"), err


@pytest.fixture
def local() -> dict[str, str]:
    own = {"GLOBALID": "0", "NTASKS": "1", "LOCALID": "0", "JOB_ID": "41"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return clean | {f"SUBMITIT_LOCAL_{name}": value for name, value in own.items()}


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_without_slurm_the_task_hands_its_signal_on(local: dict[str, str], name: str):
    process = start(local, CATCHER)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[f"SIG{name}"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"caught SIG{name}\nreturned 5\n"), err


def test_without_slurm_a_child_that_does_not_stop_is_killed(local: dict[str, str]):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    process = start(local, deaf)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "returned 137\n"
