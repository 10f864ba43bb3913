"""Checkpoints that tests write themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bbu.run.folder import RunFolder
from bbu.run.publishing import Origin, PendingCheckpoint, Ranks, stage_checkpoint

ALONE = Ranks()
NOWHERE = Origin("", None)


@contextmanager
def publishing(run: RunFolder, step: int, ranks: Ranks = ALONE, origin: Origin = NOWHERE) -> Iterator[Path]:
    """Yield the hidden folder of a step; when the block is left, the checkpoint is published."""
    yield stage_checkpoint(run, step, ranks)
    ranks.barrier()
    PendingCheckpoint(run, step, ranks, origin).wait()


def save(run: RunFolder, step: int, ranks: Ranks = ALONE) -> Path:
    """Publish a checkpoint with small files as Trainer and DeepSpeed name them."""
    with publishing(run, step, ranks, Origin("c0ffee", "sha256:1234")) as folder:
        (folder / "global_step").mkdir(exist_ok=True)
        (folder / f"rng_state_{ranks.rank}.pth").write_bytes(f"rng {ranks.rank} of {step}".encode())
        (folder / "global_step" / f"optim_{ranks.rank}.pt").write_bytes(bytes([ranks.rank, step % 256] * 500))
        if ranks.rank == 0:
            (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return run.checkpoint(step)


def hidden(run: RunFolder) -> list[str]:
    """Names in a run folder that begin with a dot."""
    return sorted(path.name for path in run.root.iterdir() if path.name.startswith("."))
