"""`python -m tests.run.save_until_killed RUN`: two ranks, as threads, save step after step until somebody kills them.

`python -m tests.run.save_until_killed RUN KILLS` starts and kills such a program again and again, at random moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bbu.run.checkpoints import clean_leftovers, newest, rotate, verify
from bbu.run.folder import RunFolder
from bbu.run.publishing import LocalBoard, PendingCheckpoint, Ranks, stage_checkpoint
from tests.checkpoints import NOWHERE
from tests.commands import ROOT

BYTES = 200_000
KEEP = 2
SAVES_BEFORE_A_KILL = 3


def save_forever(run: RunFolder) -> None:
    """Save one step after the other, and say which are published."""
    clean_leftovers(run)
    found = newest(run)
    step = found.manifest.step if found else 0
    print("ready", flush=True)
    barrier, board = threading.Barrier(2), LocalBoard()
    ranks = [Ranks(rank, 2, lambda: (barrier.wait(), None)[1], board) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        while True:
            step += 1
            list(pool.map(save_step, [run, run], [step, step], ranks))
            print(step, flush=True)


def save_step(run: RunFolder, step: int, ranks: Ranks) -> None:
    folder = stage_checkpoint(run, step, ranks)
    (folder / f"rng_state_{ranks.rank}.pth").write_bytes(os.urandom(100))
    (folder / f"zero_pp_rank_{ranks.rank}_mp_rank_00_optim_states.pt").write_bytes(os.urandom(BYTES))
    if ranks.rank == 0:
        (folder / "model.safetensors").write_bytes(os.urandom(BYTES))
    ranks.barrier()
    PendingCheckpoint(run, step, ranks, NOWHERE, after=lambda: (rotate(run, KEEP), None)[1]).wait()


def kill_again_and_again(run: RunFolder, kills: int, seed: int = 0) -> int:
    """Kill such a program `kills` times, and check after each kill what it has left.

    Returns:
        How many of the kills came in the middle of a save.
    """
    moments, amid = random.Random(seed), 0
    longest_life = time_saves(run)
    for _ in range(kills):
        announced = kill_one(run, moments.uniform(0, longest_life))
        amid += bool(list(run.root.glob(".saving-*")))
        for step in run.steps():
            verify(run.checkpoint(step))
        assert (run.steps() or [0])[-1] >= announced, "a step that was reported as published is gone"
    return amid


def time_saves(run: RunFolder) -> float:
    """Seconds that some saves take on this machine."""
    with start(run) as program:
        assert program.stdout is not None
        began = time.monotonic()
        for _ in range(SAVES_BEFORE_A_KILL):
            program.stdout.readline()
        program.kill()
        return time.monotonic() - began


def kill_one(run: RunFolder, after: float) -> int:
    """Start a program, kill it after some seconds, and return the last step that it reported as published."""
    with start(run) as program:
        assert program.stdout is not None
        time.sleep(after)
        program.kill()
        steps = [int(line) for line in program.stdout.read().splitlines() if line.isdecimal()]
    return steps[-1] if steps else 0


def start(run: RunFolder) -> subprocess.Popen[str]:
    """Start a program that saves; returns once it begins to."""
    argv = [sys.executable, "-m", "tests.run.save_until_killed", str(run.root)]
    program = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    return program


if __name__ == "__main__":
    folder = RunFolder(Path(sys.argv[1])).create()
    if len(sys.argv) > 2:
        print(f"{kill_again_and_again(folder, int(sys.argv[2]))} of {sys.argv[2]} kills came in the middle of a save")
    else:
        save_forever(folder)
