"""Stop signals: they set one flag in one process, all ranks agree on it, and DataLoader workers outlive them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from bbu.errors import STOP_SIGNALS
from bbu.training.preemption import StopFlag, install_stop_handlers, obey_parent_only, stop_agreed
from tests.commands import ROOT

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    yield install_stop_handlers()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_each_stop_signal_sets_the_flag_and_may_come_twice(flag: StopFlag, number: signal.Signals):
    assert not flag.is_set
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.received == number


def test_installing_again_keeps_the_flag_and_what_it_saw(flag: StopFlag):
    os.kill(os.getpid(), signal.SIGUSR2)
    assert install_stop_handlers() is flag
    assert flag.received == signal.SIGUSR2


def test_a_process_without_peers_agrees_with_itself(flag: StopFlag):
    assert not stop_agreed(flag)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop_agreed(flag)


def fork_and_wait(target, *args: object) -> BaseProcess:
    """Fork a child that runs `target`; returns when the child says that it is ready."""
    ready = FORK.Event()
    child = FORK.Process(target=target, args=(ready, *args), daemon=True)
    child.start()
    assert ready.wait(20)
    return child


def sleep_unguarded(ready: Event) -> None:
    ready.set()
    while True:
        signal.pause()


def sleep_guarded(ready: Event) -> None:
    obey_parent_only()
    sleep_unguarded(ready)


def test_a_forked_child_ignores_usr_and_ends_by_term(flag: StopFlag):
    child = fork_and_wait(sleep_unguarded)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.kill(child.pid or 0, number)
    child.join(0.2)
    assert child.is_alive()
    child.terminate()
    child.join(20)
    assert child.exitcode == -signal.SIGTERM
    assert not flag.is_set


def test_a_worker_outlives_slurms_signals_and_obeys_its_parent(flag: StopFlag):
    child = fork_and_wait(sleep_guarded)
    for name in ("USR1", "USR2", "TERM", "INT"):  # from another process, as Slurm's and the terminal's
        subprocess.run(["/bin/kill", f"-{name}", str(child.pid)], check=True)
    child.join(0.3)
    assert child.is_alive()
    child.terminate()
    child.join(20)
    assert child.exitcode == 0


def test_two_ranks_stop_at_the_same_step_though_only_one_received_the_signal(tmp_path: Path):
    pair = [run_program("stop_two_ranks", str(rank), str(tmp_path / "store")) for rank in range(2)]
    assert [process.communicate(timeout=120)[0] for process in pair] == ["3 False\n", "3 True\n"]
    assert [process.returncode for process in pair] == [0, 0]


def test_a_real_dataloader_finishes_its_epoch_after_every_process_was_signalled():
    process = run_program("signal_dataloader")
    assert (process.communicate(timeout=120)[0], process.returncode) == ("40 True\n", 0)


def test_one_ctrl_c_is_noticed_and_a_second_one_leaves_at_once_even_from_code_in_c():
    process = run_program("blocked_in_c", stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "blocked\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the same press, forwarded by a launcher
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "press it again to leave at once" in errors and "Traceback" not in errors


def run_program(name: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """Start a module of tests/training/programs."""
    argv = [sys.executable, "-m", f"tests.training.programs.{name}", *arguments]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
