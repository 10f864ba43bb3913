"""Stop signals: a flag, once, in one process; agreed by all ranks; workers outlive them."""

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

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield install_stop_handlers()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
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


def wait_ready(target, *args: object) -> BaseProcess:
    ready = FORK.Event()
    child = FORK.Process(target=target, args=(ready, *args), daemon=True)
    child.start()
    assert ready.wait(20)
    return child


def sleep_bare(ready: Event) -> None:
    ready.set()
    while True:
        signal.pause()


def sleep_guarded(ready: Event) -> None:
    obey_parent_only()
    sleep_bare(ready)


def test_a_forked_child_is_deaf_to_usr_and_ends_by_term(flag: StopFlag):
    child = wait_ready(sleep_bare)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        os.kill(child.pid or 0, number)
    child.join(0.2)
    assert child.is_alive()
    child.terminate()
    child.join(20)
    assert child.exitcode == -signal.SIGTERM
    assert not flag.is_set


def test_a_worker_outlives_slurms_signals_and_obeys_its_parent(flag: StopFlag):
    child = wait_ready(sleep_guarded)
    for name in ("USR1", "USR2", "TERM"):  # from another process, as Slurm's
        subprocess.run(["/bin/kill", f"-{name}", str(child.pid)], check=True)
    child.join(0.3)
    assert child.is_alive()
    child.terminate()
    child.join(20)
    assert child.exitcode == 0


RANK = """
import os, signal, sys, time
from bbu.training.preemption import install_stop_handlers, stop_agreed
flag = install_stop_handlers()
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for step in range(6):
    if step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    if stop_agreed(flag):
        break
print(step, flag.is_set)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_stop_at_the_same_step_though_one_alone_was_told(tmp_path: Path):
    argv = [sys.executable, "-c", RANK]
    pair = [
        subprocess.Popen([*argv, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in pair] == ["3 False\n", "3 True\n"]
    assert [process.returncode for process in pair] == [0, 0]


LOADER = """
import os, subprocess, sys
from bbu.training.preemption import install_stop_handlers, obey_parent_only
flag = install_stop_handlers()
from torch.utils.data import DataLoader
loader = DataLoader(range(40), batch_size=1, num_workers=2, worker_init_fn=obey_parent_only, persistent_workers=True)
seen = 0
for batch in loader:
    seen += 1
    if seen == 5:
        workers = [str(w.pid) for w in loader._iterator._workers]
        for name in ("USR1", "USR2", "TERM"):
            subprocess.run(["/bin/kill", "-" + name, str(os.getpid()), *workers], check=True)
print(seen, flag.is_set)
"""


def test_a_real_dataloader_finishes_its_epoch_after_every_process_was_signalled():
    done = subprocess.run([sys.executable, "-c", LOADER], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "40 True\n"), done.stderr
