"""Stands in for a trainer: counts steps, saves when a stop signal comes, goes on where it stopped. Rank 0 alone
writes; `counter.py NAME STEPS SECONDS_PER_STEP`. It saves by itself every tenth step: a dead node sends no signal.
"""

import os
import signal
import sys
import time
from pathlib import Path

caught: list[int] = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: caught.append(number))

saved, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
chief = os.environ["RANK"] == "0"
step = int(saved.read_text()) if saved.exists() else 0
rank = "" if chief else f"rank {os.environ['RANK']}: "
print(f"{rank}start", os.environ.get("SLURM_RESTART_COUNT", "0"), "at step", step, flush=True)


def save() -> None:
    """Whole or not at all, by one rank."""
    if chief:
        draft = saved.with_suffix(".draft")
        draft.write_text(str(step))
        draft.replace(saved)


while step < steps:
    time.sleep(pause)
    if caught:
        save()
        print(f"{rank}saved step {step} after {signal.Signals(caught[0]).name}", flush=True)
        sys.exit(75)
    step += 1
    if step % 10 == 0:
        save()
print(f"{rank}done at step", step, flush=True)
