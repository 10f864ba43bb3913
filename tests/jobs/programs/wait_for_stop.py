"""A command that waits for a stop signal, names it and leaves with 5."""

import os
import signal
import time
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    print("caught", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    os._exit(5)  # as the trainer, which a second signal cannot kill in a teardown


for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(name, stop)
print("ready", flush=True)
time.sleep(60)
