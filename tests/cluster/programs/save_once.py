"""Wait for a stop signal on the first start, as a trainer that saves does, and end well on the second."""

import os
import signal
import time

received: list[int] = []
for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(name, lambda number, frame: received.append(number))
place = " ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
print("start", restarts, place, flush=True)
if restarts == "0":
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    import decimal  # from the image, which must still be there
    import sqlite3

    assert decimal and sqlite3
    print("saved", flush=True)
    os._exit(75 if received else 1)  # as the trainer, which a second signal cannot kill in a teardown
