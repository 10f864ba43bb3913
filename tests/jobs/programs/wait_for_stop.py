"""A command that waits for a stop signal, names it and leaves with 5."""

import signal
import sys
import time
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    print("caught", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    sys.exit(5)


for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(name, stop)
print("ready", flush=True)
time.sleep(60)
