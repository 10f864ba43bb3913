"""Stands in for a trainer: counts steps, saves when a stop signal comes, resumes where it stopped.

`counter.py FILE STEPS SECONDS_PER_STEP`. Only rank 0 writes FILE. It also saves every tenth step: a dead node sends no
signal.
"""

import os
import signal
import sys
import time
from pathlib import Path

received: list[int] = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))

saved, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
is_rank_0 = os.environ["RANK"] == "0"
step = int(saved.read_text()) if saved.exists() else 0
rank = "" if is_rank_0 else f"rank {os.environ['RANK']}: "
print(f"{rank}start", os.environ.get("SLURM_RESTART_COUNT", "0"), "at step", step, flush=True)


def save() -> None:
    """Replace the file: a reader sees the old step or the new one, never a part."""
    if is_rank_0:
        draft = saved.with_suffix(".draft")
        draft.write_text(str(step))
        draft.replace(saved)


while step < steps:
    time.sleep(pause)
    if received:
        save()
        print(f"{rank}saved step {step} after {signal.Signals(received[0]).name}", flush=True)
        os._exit(75)  # as the trainer: Python's teardown gives up the handlers, and a second signal would kill it there
    step += 1
    if step % 10 == 0:
        save()
print(f"{rank}done at step", step, flush=True)
