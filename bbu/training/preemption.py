"""Stopping with the state saved: a signal sets a flag, and all ranks agree on it at a step boundary.

The journey of a stop signal in the trainer: `bbu/train.py` installs the handlers, the flag is set here, `_StopCallback`
in `trainer.py` lets all ranks agree and saves the step, `coordinator.py` returns the exit code, and `bbu/errors.py`
ends the process with it.

`install_stop_handlers` runs before the heavy imports, so nothing here imports torch at the top.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from bbu.errors import STOP_SIGNALS


class StopFlag:
    """Remembers the first stop signal that this process received; later ones change nothing."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.received: signal.Signals | None = None

    @property
    def is_set(self) -> bool:
        """Whether a stop signal has come."""
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A forked child inherits this handler: there USR1 and USR2 do nothing, and TERM ends it."""
        if os.getpid() == self.pid:
            self.received = self.received or signal.Signals(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def install_stop_handlers() -> StopFlag:
    """Install handlers for STOP_SIGNALS and return their flag; a second call in the process returns the same flag."""
    handler = signal.getsignal(STOP_SIGNALS[0])
    owner = getattr(handler, "__self__", None)
    flag = owner if isinstance(owner, StopFlag) and owner.pid == os.getpid() else StopFlag()
    for number in STOP_SIGNALS:
        signal.signal(number, flag.handle)
    return flag


def stop_agreed(flag: StopFlag) -> bool:
    """Return whether any rank has received a stop signal.

    Collective: every rank calls it at the same step boundary and gets the same answer, so all save the same step.
    Without a process group the answer is the flag of this process.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return flag.is_set
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL does not reduce tensors on the CPU
    received = torch.tensor([int(flag.is_set)], dtype=torch.int32, device=device)
    dist.all_reduce(received, op=dist.ReduceOp.MAX)
    return bool(received.item())


def obey_parent_only(worker_id: int = 0) -> None:
    """Make a DataLoader worker ignore Slurm's stop signals and still end by its parent's TERM (a `worker_init_fn`).

    Slurm signals every process of a step. A worker that TERM kills raises an error in its trainer before the trainer
    has saved; a worker that ignores TERM hangs the trainer's own shutdown. Only the sender tells the two apart, and
    sigwaitinfo is the call that names it.
    """
    parent = os.getppid()
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_parent_says, args=(parent,), name="obey-parent", daemon=True).start()


def _exit_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
