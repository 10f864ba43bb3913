"""Call a ContainerTask as submitit does, with submitit's own handler in place: `call_task.py COMMAND...`."""

import signal
import sys
from pathlib import Path

from bbu.jobs.launch import task_command
from bbu.jobs.task import ContainerTask

CHECKOUT = Path(__file__).resolve().parents[3]

signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit("submitit's handler ran"))
task = ContainerTask(task_command(CHECKOUT, None, tuple(sys.argv[1:])), {}, grace_seconds=1)
print("returned", task(), flush=True)
