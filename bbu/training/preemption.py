"""Stopping with the state saved: Slurm's signals set a flag, and all ranks agree on it at a step boundary.

`install_stop_handlers` runs before the heavy imports, so nothing here imports torch at the top.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from bbu.errors import STOP_SIGNALS


class StopFlag:
    """Set by the first stop signal, and by any number of further ones; only in the process that installed it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.received: signal.Signals | None = None

    @property
    def is_set(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A forked child inherits it: it is deaf to USR1 and USR2, and TERM ends it as ever."""
        if os.getpid() == self.pid:
            self.received = self.received or signal.Signals(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def install_stop_handlers() -> StopFlag:
    """Install the handlers and return their flag; a second call in the same process returns the same flag."""
    handler = signal.getsignal(STOP_SIGNALS[0])
    installed = getattr(handler, "__self__", None)
    flag = installed if isinstance(installed, StopFlag) and installed.pid == os.getpid() else StopFlag()
    for number in STOP_SIGNALS:
        signal.signal(number, flag.handle)
    return flag


def stop_agreed(flag: StopFlag) -> bool:
    """Whether any rank has seen a stop signal. Collective: every rank calls it at the same step boundary.

    All ranks get the same answer, so all save the same step. Without a process group it is the own flag.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return flag.is_set
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL reduces nothing that lies on the CPU
    seen = torch.tensor([int(flag.is_set)], dtype=torch.int32, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def obey_parent_only(worker_id: int = 0) -> None:
    """A DataLoader's `worker_init_fn`: stop signals from Slurm pass by, the parent's TERM still ends the worker.

    Slurm signals every process of a step. A worker that TERM kills raises in its trainer before that has
    saved; one that ignores TERM hangs the trainer's own shutdown. Only the sender tells the two apart, and
    sigwaitinfo is the call that names it.
    """
    parent = os.getppid()
    for number in STOP_SIGNALS[:2]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parent, args=(parent,), name="obey-parent", daemon=True).start()


def _await_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
