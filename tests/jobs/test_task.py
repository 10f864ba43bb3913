"""The host half of a task: the rank's place, how its end is reported, and who requeues. Its commands are processes.

What it does on a real Slurm stands in tests/cluster/test_requeue.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bbu.config.read import CONFIG_DIR
from bbu.errors import PREEMPTED_EXIT_CODE, STOP_SIGNALS
from bbu.jobs.task import state_max_requeues
from tests.commands import call

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"
EPHEMERAL_PORTS = 32_768
RANK_3 = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41",
}  # fmt: skip
LOCAL_RANK_0 = {
    "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": "1",
    "SUBMITIT_LOCAL_LOCALID": "0", "SUBMITIT_LOCAL_JOB_ID": "41",
}  # fmt: skip

SlurmCommands = Callable[..., None]


@pytest.fixture
def slurm_commands(tmp_path: Path) -> SlurmCommands:
    """Stand-ins for `scontrol`, which notes what it is asked to requeue, and `squeue`, which prints the job's state."""

    def install(state: str = "RUNNING", requeue_code: int = 0, squeue_code: int = 0) -> None:
        programs = {
            "scontrol": f"""
            case $1 in
                show) printf '%s\\n' "${{3%%[*}}07" "${{3%%[*}}08" ;;
                requeue) echo "$@" >>{tmp_path}/requeued; echo not today >&2; exit {requeue_code} ;;
            esac
            """,
            "squeue": f'echo "$@" >>{tmp_path}/queried; echo {state}; exit {squeue_code}',
            "sleep": "exit 0",
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)

    install()
    return install


@pytest.fixture
def slurm(tmp_path: Path, slurm_commands: SlurmCommands) -> dict[str, str]:
    """The environment of rank 0 of a Slurm job."""
    return outside_of_slurm() | RANK_3 | {"SLURM_PROCID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.fixture
def local() -> dict[str, str]:
    """The environment of the only rank of a job of submitit's local executor."""
    return outside_of_slurm() | LOCAL_RANK_0


def outside_of_slurm() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    return clean | {"BBU_HOME": str(ROOT)}


def run_task(environ: dict[str, str], *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `slurm/task.sh` with one of the programs as its command."""
    program, *arguments = command
    argv = ["bash", str(ROOT / "slurm/task.sh"), sys.executable, str(PROGRAMS / program), *arguments]
    return subprocess.run(argv, env=environ | changes, cwd=ROOT, text=True, capture_output=True, timeout=60)


def start_through_submitit(environ: dict[str, str], *command: str) -> subprocess.Popen[str]:
    """Start one of the programs through a ContainerTask, in a session of its own."""
    program, *arguments = command
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / "call_task.py"), str(PROGRAMS / program), *arguments],
        env=environ, cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_through_submitit(environ: dict[str, str], *command: str) -> tuple[int, str, str]:
    process = start_through_submitit(environ, *command)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def start_and_wait_until_ready(environ: dict[str, str], program: str) -> subprocess.Popen[str]:
    process = start_through_submitit(environ, program)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


# A rank's place.


def test_a_rank_learns_its_place_from_slurm(slurm: dict[str, str]):
    done = run_task(slurm | RANK_3, "print_rank.py", BBU_MASTER_SUFFIX="-ib")
    assert done.stdout == "3 4 1 gpu07-ib 20041 ''\n", done.stderr


def test_a_step_on_part_of_the_job_has_its_own_first_node_and_size(slurm: dict[str, str]):
    done = run_task(slurm, "print_rank.py", SLURM_STEP_NODELIST="cpu[07-08]", SLURM_STEP_NUM_TASKS="2")
    assert done.stdout.split()[:4] == ["0", "2", "1", "cpu07"]


def test_a_rank_learns_its_place_from_submitits_local_executor(local: dict[str, str]):
    assert run_task(local, "print_rank.py").stdout == "0 1 0 127.0.0.1 20041 ''\n"


def test_outside_of_a_job_there_is_no_rank():
    done = run_task(outside_of_slurm(), "leave.py", "0")
    assert done.returncode == 127 and "srun or by submitit" in done.stderr


def test_a_node_list_that_scontrol_cannot_read_is_refused(slurm: dict[str, str], tmp_path: Path):
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho 'Invalid hostlist' >&2; exit 1\n")
    done = run_task(slurm, "leave.py", "0")
    assert done.returncode == 127 and "cannot read the node list gpu[07-08]" in done.stderr


@pytest.mark.parametrize(("job", "restarts"), [(1, 0), (9_999, 0), (10**9, 0), (41, 1), (41, 1000)])
def test_the_port_stays_below_the_ephemeral_ones_and_changes_with_job_and_restart(
    slurm: dict[str, str], job: int, restarts: int
):
    def port(job: int, restarts: int) -> int:
        changes = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts)}
        return int(run_task(slurm, "print_rank.py", **changes).stdout.split()[4])

    first = port(job, restarts)
    assert 20_000 <= first < 30_000 < EPHEMERAL_PORTS
    assert first != port(job + 1, restarts) and first != port(job, restarts + 1)


def test_stop_signals_reach_the_command_with_their_default_action(slurm: dict[str, str]):
    """A signal that a shell ignores is ignored by what it starts: the task adds none to those of this process."""
    argv = [sys.executable, str(PROGRAMS / "signal_dispositions.py")]
    inherited = subprocess.run(argv, text=True, capture_output=True, check=True).stdout
    assert not {number.name for number in STOP_SIGNALS} & set(inherited.split())
    assert run_task(slurm, "signal_dispositions.py").stdout == inherited
    assert run_through_submitit(slurm, "signal_dispositions.py")[1] == inherited


# The end under Slurm.


@pytest.mark.parametrize("code", [0, 1, 7, 137])
def test_a_code_passes_through_unchanged(slurm: dict[str, str], code: int):
    assert run_task(slurm, "leave.py", str(code)).returncode == code
    assert run_through_submitit(slurm, "leave.py", str(code))[0] == code


def test_a_command_killed_by_a_signal_gives_a_shells_code(slurm: dict[str, str]):
    assert run_task(slurm, "die.py").returncode == 137


def requeued(tmp_path: Path) -> str:
    """What scontrol was asked to requeue."""
    path = tmp_path / "requeued"
    return path.read_text() if path.exists() else ""


def test_rank_0_requeues_a_job_that_saved_its_state(slurm: dict[str, str], tmp_path: Path):
    done = run_task(slurm, "leave.py", "75", "1")
    assert done.returncode == 0 and "requeued (restart 1 of 1)" in done.stderr
    assert requeued(tmp_path) == "requeue 41\n"


def test_submitit_hands_over_to_the_same_host_half(slurm: dict[str, str], tmp_path: Path):
    code, _, err = run_through_submitit(slurm, "leave.py", "75", "1")
    assert code == 0 and "requeued (restart 1 of 1)" in err
    assert requeued(tmp_path) == "requeue 41\n"


def test_the_other_ranks_leave_with_0(slurm: dict[str, str], tmp_path: Path):
    assert run_task(slurm, "leave.py", "75", SLURM_PROCID="1").returncode == 0
    assert not requeued(tmp_path)


def test_the_code_for_a_saved_state_is_the_programs():
    assert f"stopped={PREEMPTED_EXIT_CODE} " in (ROOT / "slurm/task.sh").read_text()


def test_an_element_of_an_array_is_requeued_as_one(slurm: dict[str, str], tmp_path: Path):
    """The last to start has the array's own number, by which all its siblings would be requeued."""
    run_task(slurm, "leave.py", "75", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="3")
    assert requeued(tmp_path) == "requeue 41_3\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", ""])
def test_a_job_that_slurm_is_ending_does_not_come_back(
    slurm: dict[str, str], slurm_commands: SlurmCommands, tmp_path: Path, state: str
):
    slurm_commands(state=state)
    done = run_task(slurm, "leave.py", "75")
    assert done.returncode == 75 and f"job 41 is {state or 'gone'}: Slurm is ending it" in done.stderr
    assert not requeued(tmp_path)


def test_a_controller_that_does_not_answer_is_queried_again_and_the_job_requeued(
    slurm: dict[str, str], slurm_commands: SlurmCommands, tmp_path: Path
):
    slurm_commands(squeue_code=1)
    assert run_task(slurm, "leave.py", "75").returncode == 0
    assert (tmp_path / "queried").read_text() == "-h -j 41 -o %T\n" * 3 and requeued(tmp_path)


def test_a_refused_requeue_is_reported(slurm: dict[str, str], slurm_commands: SlurmCommands):
    slurm_commands(requeue_code=1)
    done = run_task(slurm, "leave.py", "75")
    assert done.returncode == 75 and "scontrol requeue 41 failed: not today" in done.stderr


# The cap.


@pytest.mark.parametrize(
    ("limit", "warns"), [("10:00", True), ("10:01", False), ("1:00:00", False), ("2-00:00:00", False)]
)
def test_a_job_that_is_told_to_save_as_soon_as_it_begins_is_warned_of(
    slurm: dict[str, str], slurm_commands: SlurmCommands, limit: str, warns: bool
):
    slurm_commands(limit)
    done = run_task(slurm, "leave.py", "0", BBU_SIGNAL_SECONDS="600")
    assert done.returncode == 0
    assert (f"time limit is {limit}, and it gets the signal to save 600 s before that" in done.stderr) == warns


def test_the_cap_ends_a_job_that_was_restarted_often_enough(slurm: dict[str, str], tmp_path: Path):
    done = run_task(slurm, "leave.py", "75", "1", SLURM_RESTART_COUNT="1")
    assert done.returncode == 75 and "the most allowed" in done.stderr and not requeued(tmp_path)


def test_the_commands_own_cap_goes_before_that_of_the_submission(slurm: dict[str, str]):
    environ = {"SLURM_RESTART_COUNT": "2"}
    assert "requeued (restart 3 of 3)" in run_task(slurm, "leave.py", "75", "3", BBU_MAX_REQUEUES="1", **environ).stderr
    assert run_task(slurm, "leave.py", "75", "1", BBU_MAX_REQUEUES="3", **environ).returncode == 75


def test_a_job_stopped_before_its_command_stated_a_cap_keeps_that_of_the_submission(slurm: dict[str, str]):
    assert run_task(slurm, "leave.py", "75", BBU_MAX_REQUEUES="0").returncode == 75
    assert "(restart 1 of 2)" in run_task(slurm, "leave.py", "75", BBU_MAX_REQUEUES="2").stderr


def test_where_nobody_stated_a_cap_it_is_that_of_the_shipped_config(slurm: dict[str, str]):
    cap = yaml.safe_load((CONFIG_DIR / "base_flat.yaml").read_text())["max_requeues"]
    assert f"(restart 1 of {cap})" in run_task(slurm, "leave.py", "75").stderr


def test_a_job_may_ask_never_to_be_requeued(slurm: dict[str, str], tmp_path: Path):
    codes = [run_task(slurm, "leave.py", "75", "3", BBU_REQUEUE="no", SLURM_PROCID=rank).returncode for rank in "01"]
    assert codes == [75, 0], "rank 0 alone reports it: another code would have srun kill the ranks that still leave"
    assert not requeued(tmp_path)


def test_the_file_of_the_cap_is_gone_with_the_task(slurm: dict[str, str], tmp_path: Path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    assert "(restart 1 of 3)" in run_task(slurm, "leave.py", "75", "3", TMPDIR=str(temporary)).stderr
    assert list(temporary.iterdir()) == []


def test_a_task_without_a_place_for_the_cap_runs_all_the_same(slurm: dict[str, str]):
    done = run_task(slurm, "leave.py", "3", TMPDIR="/no/such")
    assert done.returncode == 3 and "cannot write to /no/such" in done.stderr


def test_a_cap_is_stated_in_the_file_that_is_named_and_in_no_other(tmp_path: Path):
    path = tmp_path / "cap"
    state_max_requeues(3, {})
    state_max_requeues(3, {"BBU_REQUEUE_CAP": str(path)})
    assert not path.exists(), "the task has ended, and with it the file"
    path.write_text("20\n")
    state_max_requeues(3, {"BBU_REQUEUE_CAP": str(path)})
    assert path.read_text() == "3\n"


@pytest.mark.parametrize(("entry", "broken"), [("train", "model_path=nowhere"), ("convert", "vendor_dir=nowhere")])
def test_an_entry_states_the_cap_of_its_run_config_before_it_begins(tmp_path: Path, entry: str, broken: str):
    """That of an eval: tests/e2e/test_eval.py."""
    cap = tmp_path / "cap"
    cap.touch()
    settings = ("max_requeues=7", broken, f"output_root={tmp_path}", f"data_root={tmp_path}")
    assert call(entry, *settings, BBU_REQUEUE_CAP=str(cap)).code != 0
    assert cap.read_text() == "7\n"


# Stop signals.


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_under_slurm_the_command_gets_the_steps_signal_and_the_task_waits_for_it(slurm: dict[str, str], name: str):
    process = start_and_wait_until_ready(slurm, "wait_for_stop.py")
    os.killpg(process.pid, signal.Signals[f"SIG{name}"])  # as Slurm does: every process of the step
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, f"caught SIG{name}\n"), err


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_without_slurm_the_task_forwards_its_signal(local: dict[str, str], name: str):
    process = start_and_wait_until_ready(local, "wait_for_stop.py")
    process.send_signal(signal.Signals[f"SIG{name}"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"caught SIG{name}\nreturned 5\n"), err


def test_without_slurm_a_command_that_does_not_stop_is_killed(local: dict[str, str]):
    process = start_and_wait_until_ready(local, "never_stop.py")
    process.terminate()
    assert process.communicate(timeout=30)[0] == "returned 137\n"


def test_without_slurm_a_saved_state_is_reported_and_its_code_returned(local: dict[str, str]):
    _, out, err = run_through_submitit(local, "leave.py", "75")
    assert out == "returned 75\n" and "run the same command again to resume" in err
