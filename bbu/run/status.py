"""`status.json`: what the trainer reports about a run while it trains, and at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder
from bbu.run.provenance import SLURM_FACTS
from bbu.strict_json import JsonError, build_dataclass, read_json

_OMITTED = ("reason", "loss", "samples_per_second", "tokens_per_second")
"""Fields that the file has only where they are known; the others are null where they are unknown."""

_STOPPED_BEFORE = "preempted"
"""The phase `stopped` as version 0.1 wrote it, whatever the reason."""
_ADVICE = "remove it, the trainer writes it again at its next heartbeat"


@dataclass(frozen=True)
class RunStatus:
    """The content of `status.json`; a field is None where the file lacks it, all of them where there is no file."""

    phase: str | None = None
    """training, completed, failed, `failed to start`, which leaves the other fields as they were, or stopped: a signal
    came, and the state is saved. Why it came (a time limit, a preemption, a person) Slurm alone knows."""
    reason: str | None = None
    """why the run has failed, in one line"""
    step: int | None = None
    """optimizer steps done"""
    max_steps: int | None = None
    """optimizer steps of the whole run"""
    epoch: float | None = None
    """epochs done, with the fraction of the current one"""
    seconds_left: float | None = None
    """estimated time to the last step; None before the first step of this start, and after the end"""
    checkpoint_step: int | None = None
    """step of the last published checkpoint"""
    heartbeat: float | None = None
    """when this was written, in seconds since 1970 by the clock of `host`"""
    host: str | None = None
    """where rank 0 runs"""
    pid: int | None = None
    """process id of rank 0 on `host`"""
    stale_after_s: float | None = None
    """age in seconds from which a status of phase `training` means that the trainer hangs or is gone"""
    loss: float | None = None
    """last logged training loss"""
    samples_per_second: float | None = None
    """samples per second over all ranks, since the log line before the last"""
    tokens_per_second: float | None = None
    """tokens per second over all ranks, since the log line before the last"""
    job: Mapping[str, str] = field(default_factory=dict)
    """Slurm's variables of the job (`SLURM_FACTS`); in the file they stand beside the other fields"""

    @property
    def state(self) -> str | None:
        """The phase, with the reason of a failure: `failed to start: no such model folder`."""
        return f"{self.phase}: {self.reason}" if self.phase and self.reason else self.phase

    @property
    def job_id(self) -> str | None:
        return self.job.get("SLURM_JOB_ID")

    @property
    def restart_count(self) -> int:
        """How many times Slurm has requeued the job."""
        count = self.job.get("SLURM_RESTART_COUNT", "")
        return int(count) if count.isdecimal() and len(count) < 10 else 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunStatus:
        """Take the known fields of a file's content; others, of another version, are ignored."""
        names = {item.name for item in fields(cls)} - {"job"}
        job = {name: data[name] for name in SLURM_FACTS if name in data}
        values = {name: data[name] for name in names & data.keys()} | {"job": job}
        if values.get("phase") == _STOPPED_BEFORE:
            values["phase"] = "stopped"
        return build_dataclass(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The file's content. A number that is not finite, which JSON has no word for, becomes null."""
        values = {item.name: _finite_or_none(getattr(self, item.name)) for item in fields(self) if item.name != "job"}
        return {k: v for k, v in values.items() if v is not None or k not in _OMITTED} | dict(self.job)


def write_status(run: RunFolder, status: RunStatus) -> None:
    """Replace `status.json` atomically."""
    write_atomic(run.status, json.dumps(status.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_status(run: RunFolder) -> RunStatus:
    """Read `status.json`; an empty status where there is no file yet. Raises CheckpointError if it is damaged."""
    try:
        return RunStatus.from_dict(read_json(run.status, CheckpointError, _ADVICE))
    except FileNotFoundError:
        return RunStatus()
    except JsonError as error:
        raise CheckpointError(f"{run.status}: {error}; {_ADVICE}") from error


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
