"""What a run reports while it trains: TensorBoard, a progress bar or log lines, and status.json."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bbu.config.domains import InfrastructureConfig
from bbu.errors import CheckpointError
from bbu.logs import format_duration
from bbu.run.folder import RunFolder
from bbu.run.status import RunStatus, read_status, write_status
from bbu.training.flops import Work

logger = logging.getLogger(__name__)
_MIN_STALE_S, _STALE_INTERVALS = 60.0, 10
"""A heartbeat counts as stale after so many of its intervals, but not before a minute: a step may be long."""
_REASON_LETTERS = 200
"""Most letters of a failure's reason in status.json."""


class Throughput:
    """Sums the work of this rank since the last log line; the rates are over all ranks.

    Args:
        flops: counts the floating-point operations of some work.
        device: where the collective runs.
        peak: FLOPs a second of one device at its best, None where that is not known.
    """

    def __init__(self, flops: Callable[[Work], float], device: torch.device | str, peak: float | None) -> None:
        self._flops, self._device, self._peak = flops, device, peak
        self._work, self._since = Work(), time.perf_counter()

    def add(self, work: Work) -> None:
        """Count the work of some batches."""
        self._work += work

    def rates(self) -> dict[str, float]:
        """Return samples, tokens and FLOPs a second, `packing_efficiency` and, on a GPU of known peak, `mfu`.

        Collective; starts a new window.
        """
        counted = torch.tensor(self._work.as_list(), dtype=torch.float64, device=self._device)
        ranks = 1
        if dist.is_initialized():
            dist.all_reduce(counted)
            ranks = dist.get_world_size()
        work, now = Work(*counted.tolist()), time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._work, self._since = Work(), now
        flops = self._flops(work) / seconds
        rates = {
            "samples_per_second": work.samples / seconds,
            "tokens_per_second": work.tokens / seconds,
            "flops_per_second": flops,
            "packing_efficiency": work.tokens / max(work.computed_tokens, 1.0),
        }
        return rates | ({"mfu": flops / (self._peak * ranks)} if self._peak else {})


class _Pace:
    """Measures how fast this start of a run trains."""

    def __init__(self) -> None:
        self._began, self._first_step = time.perf_counter(), 0

    def begin(self, state: TrainerState) -> None:
        """Start the clock at the current step."""
        self._began, self._first_step = time.perf_counter(), state.global_step

    def seconds_left(self, state: TrainerState) -> float | None:
        """Time to the last step at the rate so far; None before this start's first step."""
        steps = state.global_step - self._first_step
        if steps <= 0:
            return None
        return (time.perf_counter() - self._began) / steps * (state.max_steps - state.global_step)


_FLUSH_SECONDS = 10
"""Seconds between flushes of the event files: what an open TensorBoard lags behind at most."""


class TensorBoardCallback(TrainerCallback):
    """Writes every logged number to TensorBoard under its own name, without a prefix."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._writer: SummaryWriter | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # Drop what an earlier start wrote after the checkpoint that this one resumes from: those steps come again.
            self._writer = SummaryWriter(
                str(self._run.tensorboard / "train"),
                purge_step=state.global_step + 1 if state.global_step else None,
                flush_secs=_FLUSH_SECONDS,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **_: Any
    ) -> None:
        if self._writer is not None:
            for name, value in logs.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._writer is not None:
            self._writer.close()


def _log_schedule(args: TrainingArguments, state: TrainerState) -> None:
    """Log how many steps a run takes, and when it saves and validates; warn where it ends before the first time."""
    kinds = (
        ("checkpoint", args.save_strategy, state.save_steps, "save_steps"),
        ("validation loss", args.eval_strategy, state.eval_steps, "eval_steps"),
    )
    times = {"epoch": "each epoch", "no": "never"}
    parts = [f"{what} {times.get(strategy) or f'every {every} steps'}" for what, strategy, every, _ in kinds]
    logger.info("%d steps; %s", state.max_steps, ", ".join(parts))
    for what, strategy, every, key in kinds:
        if strategy == "steps" and every > state.max_steps:
            logger.warning(
                "no %s before the end: %s is %d, and the run has %d steps", what, key, every, state.max_steps
            )


class ProgressCallback(TrainerCallback):
    """Shows step, loss, samples a second and the time left: a bar on a terminal, plain lines in a job's log.

    Args:
        display: the config's `progress`: auto (bar on a terminal, lines elsewhere), bar, lines or off.
    """

    def __init__(self, display: str) -> None:
        self._display = ("bar" if sys.stderr.isatty() else "lines") if display == "auto" else display
        self._bar: tqdm | None = None
        self._pace = _Pace()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace.begin(state)
        if not state.is_world_process_zero:
            return
        _log_schedule(args, state)
        if self._display == "bar":
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **_: Any
    ) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        text = f"loss {logs['loss']:.4f}, {logs['samples_per_second']:.1f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._display == "lines":
            left = format_duration(self._pace.seconds_left(state))
            logger.info("step %d/%d: %s, %s left", state.global_step, state.max_steps, text, left)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class StatusCallback(TrainerCallback):
    """Writes status.json, the heartbeat: every `status_interval_s` seconds, at each checkpoint, and at the end."""

    def __init__(self, run: RunFolder, infrastructure: InfrastructureConfig, job: Mapping[str, str]) -> None:
        self._run, self._interval, self._job = run, infrastructure.status_interval_s, dict(job)
        self._pace, self._written = _Pace(), 0.0
        self._logs: dict[str, float] = {}
        self._checkpoint: int | None = None
        self._state: TrainerState | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._state = state
        self._pace.begin(state)
        self._checkpoint = state.global_step or None
        self.write(state, "training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() - self._written >= self._interval:
            self.write(state, "training")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **_: Any
    ) -> None:
        self._logs |= {k: logs[k] for k in ("loss", "samples_per_second", "tokens_per_second") if k in logs}

    def write_checkpoint(self, step: int) -> None:
        """Write that the checkpoint of a step is published."""
        self._checkpoint = step
        if self._state is not None:
            self.write(self._state, "training")

    def write_failure(self, reason: str) -> None:
        """Write that the training or, before its first step, its start has failed. Rank 0 calls it."""
        reason = reason.splitlines()[0][:_REASON_LETTERS]
        if self._state is not None:
            self.write(self._state, "failed", reason)
        else:
            self._replace_status(phase="failed to start", reason=reason)

    def write_stop_before_training(self, step: int, max_steps: int) -> None:
        """Write that a stop signal came before the first step of this start. Rank 0 alone writes."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._replace_status(phase="stopped", reason=None, step=step, max_steps=max_steps)

    def _replace_status(self, **changes: Any) -> None:
        """Change fields of the earlier start's status, where there is one that can be read.

        A run that is completed stays so: a start that does nothing takes nothing away from it.
        """
        try:
            before = read_status(self._run)
        except CheckpointError:
            before = RunStatus()
        if before.phase == "completed":
            return
        now = {"heartbeat": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": self._job}
        self._write(dataclasses.replace(before, seconds_left=None, **now, **changes))

    def write(self, state: TrainerState, phase: str, reason: str | None = None) -> None:
        """Write status.json with the phase training, completed, stopped or failed. Rank 0 alone writes."""
        if not state.is_world_process_zero:
            return
        self._written = time.monotonic()
        left = self._pace.seconds_left(state) if phase == "training" else None
        status = RunStatus(
            phase=phase,
            reason=reason,
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            seconds_left=left,
            checkpoint_step=self._checkpoint,
            heartbeat=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            stale_after_s=max(_MIN_STALE_S, _STALE_INTERVALS * self._interval),
            **self._logs,
            job=self._job,
        )
        self._write(status)

    def _write(self, status: RunStatus) -> None:
        try:
            write_status(self._run, status)
        except OSError as error:  # a heartbeat is not worth a run
            logger.warning("status.json could not be written: %s", error)
