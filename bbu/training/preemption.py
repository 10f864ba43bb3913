"""Stopping with the state saved: a signal, or Ctrl-C, sets a flag, and all ranks agree on it at a step boundary.

The journey of a stop signal in the trainer: `bbu/train.py` installs the handlers, the flag is set here, `_StopCallback`
in `trainer.py` lets all ranks agree and saves the step, `coordinator.py` returns the exit code, and `bbu/errors.py`
ends the process with it.

`install_stop_handlers` runs before the heavy imports, so nothing here imports torch at the top.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from bbu.errors import INTERRUPTED_EXIT_CODE, STOP_SIGNALS

_SAVING_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
"""The signals after which the step is saved: Slurm's, and Ctrl-C."""
_ONE_PRESS_S = 0.1
"""Seconds within which a second SIGINT is the same Ctrl-C: the terminal signals every process, and launchers forward
what they get."""
_NOTICE = b"bbu.train: Ctrl-C: this step is saved first; press it again to leave at once without saving\n"


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
        """Handle a signal. A forked child inherits this handler: there TERM ends it, and the others do nothing."""
        if os.getpid() == self.pid:
            self.received = self.received or signal.Signals(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def install_stop_handlers() -> StopFlag:
    """Install handlers for the stop signals and Ctrl-C, and return their flag; a second call returns the same flag."""
    handler = signal.getsignal(STOP_SIGNALS[0])
    owner = getattr(handler, "__self__", None)
    flag = owner if isinstance(owner, StopFlag) and owner.pid == os.getpid() else StopFlag()
    for number in _SAVING_SIGNALS:
        signal.signal(number, flag.handle)
    return flag


def leave_on_second_interrupt(is_first_rank: bool = True) -> None:
    """Make a second Ctrl-C end this process at once with INTERRUPTED_EXIT_CODE. Call it after install_stop_handlers.

    A handler in Python runs only once the interpreter is back from C, and a collective whose peer is gone never comes
    back. So a thread reads the signals from a pipe that the interpreter writes them to as they arrive.

    Args:
        is_first_rank: say after the first Ctrl-C what a second one does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    threading.Thread(target=_leave_on_second, args=(reader, is_first_rank), name="interrupts", daemon=True).start()


def _leave_on_second(reader: int, is_first_rank: bool) -> None:
    first: float | None = None
    while True:
        if signal.SIGINT not in os.read(reader, 1):
            continue
        if first is None:
            first = time.monotonic()
            os.write(2, _NOTICE if is_first_rank else b"")
        elif time.monotonic() - first > _ONE_PRESS_S:
            os._exit(INTERRUPTED_EXIT_CODE)


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
    """Make a DataLoader worker ignore stop signals and Ctrl-C and still end by its parent's TERM (a `worker_init_fn`).

    Slurm signals every process of a step, and a terminal every process in the foreground. A worker that TERM kills
    raises an error in its trainer before the trainer has saved; a worker that ignores TERM hangs the trainer's own
    shutdown. Only the sender tells the two apart, and sigwaitinfo is the call that names it.
    """
    parent = os.getppid()
    for number in _SAVING_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_parent_says, args=(parent,), name="obey-parent", daemon=True).start()


def _exit_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
