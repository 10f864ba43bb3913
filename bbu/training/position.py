"""Where in the training data a checkpoint stands, by the names of the photos that its epoch has seen.

A run that resumes under the same cut of its data continues with the next batch. Under another cut (batch size, ranks,
accumulation, packed rows), or with other records, it continues the epoch with the samples that it has not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bbu.data.sampling import EpochBatchSampler
from bbu.errors import CheckpointError, DataError
from bbu.strict_json import JsonError, build_dataclass, read_json

_FILE = "data_position.json"
"""In a checkpoint, beside trainer_state.json."""


@dataclass(frozen=True)
class DataPosition:
    """The content of `data_position.json`."""

    epoch: int
    """Epochs that are complete."""
    batches: int
    """Batches of each rank that the epoch after them has had."""
    accumulation: int
    """Batches of an optimizer step."""
    plan: str
    """SHA-256 of the batches of that epoch on all ranks; empty where the run has no plan for it."""
    seen: tuple[str, ...]
    """Photos that the epoch has had, once for each sample."""


def measure_position(sampler: EpochBatchSampler, names: Sequence[str], batches: int, accumulation: int) -> DataPosition:
    """Measure how far the training has come.

    Args:
        sampler: cuts the data.
        names: the photo of each sample.
        batches: batches that each rank has had since the run began.
        accumulation: batches of an optimizer step.
    """
    epoch, done = divmod(batches, len(sampler))
    seen = sorted(sampler.seen_in(epoch, done)) if done else []
    plan = _plan_hash(sampler, names, epoch)
    return DataPosition(epoch, done, accumulation, plan, tuple(names[index] for index in seen))


def is_same_cut(position: DataPosition, sampler: EpochBatchSampler, names: Sequence[str], accumulation: int) -> bool:
    """Whether a sampler cuts the epoch of a position into the very batches that its run had."""
    return position.accumulation == accumulation and position.plan == _plan_hash(sampler, names, position.epoch)


def seen_indices(position: DataPosition, names: Sequence[str]) -> set[int]:
    """The samples of the present records that the epoch of a position has had."""
    left = Counter(position.seen)
    indices = set()
    for index, name in enumerate(names):
        if left[name]:
            left[name] -= 1
            indices.add(index)
    return indices


def write_position(folder: Path, position: DataPosition) -> None:
    """Write the position into a checkpoint that is being saved."""
    (folder / _FILE).write_text(json.dumps(asdict(position), ensure_ascii=False) + "\n", encoding="utf-8")


def read_position(folder: Path) -> DataPosition | None:
    """Read the position of a checkpoint; None for one of a version that wrote none."""
    if not (folder / _FILE).exists():
        return None
    advice = "use another checkpoint"
    try:
        return build_dataclass(DataPosition, read_json(folder / _FILE, CheckpointError, advice))
    except JsonError as error:
        raise CheckpointError(f"{folder / _FILE}: {error}; {advice}") from error


def _plan_hash(sampler: EpochBatchSampler, names: Sequence[str], epoch: int) -> str:
    """The hash of `DataPosition.plan`."""
    try:
        steps = sampler.steps_of(epoch)
    except DataError:  # after the last epoch of a run: one more could need more packed rows than all that were planned
        return ""
    plan = [[[names[index] for index in share] for share in step] for step in steps]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()
