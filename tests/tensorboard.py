"""Reading back what a run wrote to TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    """The training curves of a run folder: tag -> step -> value."""
    events = EventAccumulator(str(run / "tensorboard" / "train")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
