"""Saves the steps of a training: its main threads write them, threads in the background publish them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bbu.config.flat import DirectConfig
from bbu.errors import CheckpointError
from bbu.evaluation.pending import unscored_steps
from bbu.run.checkpoints import config_hash, rotate
from bbu.run.folder import RunFolder
from bbu.run.publishing import Board, LocalBoard, Origin, PendingCheckpoint, Ranks, stage_checkpoint

logger = logging.getLogger(__name__)
_SIGNAL_SECONDS = "BBU_SIGNAL_SECONDS"
"""The variable in which a job states its profile's signal_seconds."""
_SHARE_OF_NOTICE = 0.8
"""Of the time between the stop signal and the end of the job, for a save; the rest is for the step under way."""


@dataclass(frozen=True)
class Publication:
    """Where checkpoints go, and what is done before, while and after they are published."""

    run: RunFolder
    """The run folder that receives them."""
    config: DirectConfig
    """The run config; its hash goes into each manifest."""
    image_digest: str | None
    """SHA-256 of the container image, None outside of one."""
    add_model_files: Callable[[Path], None]
    """Writes what a model folder needs beside its weights into the given folder; called on rank 0."""
    check_lease: Callable[[], None]
    """Raises CheckpointError if another trainer has taken over the run folder."""
    report_published: Callable[[int], None]
    """Is told the step of each checkpoint once it is published; called on rank 0."""
    notice_seconds: int | None
    """Seconds between the stop signal and the end of the job, None where that is not known."""


class CheckpointSaver:
    """Saves steps one after the other.

    Every rank has one, and all ranks call `save_step` and `await_publication` at the same steps.

    Args:
        publication: where and how checkpoints are published.
        rank: the number of this rank.
        world_size: the number of ranks.
        barrier: returns once every rank has called it.
    """

    def __init__(self, publication: Publication, rank: int, world_size: int, barrier: Callable[[], None]) -> None:
        self.saved_step: int | None = None
        """the last step that is published, or on its way"""
        self._publication = publication
        self._ranks = Ranks(rank, world_size, barrier, _shared_board())
        self._pending: PendingCheckpoint | None = None
        self._began, self._written, self._is_first = 0.0, 0.0, True

    def save_step(self, step: int, check: Callable[[], None], write: Callable[[Path], None]) -> None:
        """Save a step; it is published later, in the background. Collective.

        Args:
            step: the step.
            check: raises where the state must not be saved, on all ranks alike.
            write: writes this rank's files into the folder that it is given.

        Raises:
            CheckpointError: another trainer has taken the run folder, or the step is published already.
            OSError: the checkpoint before this one could not be published.
        """
        self._wait()  # two saves at a time would share the disk, and double the space that it needs
        publication, self._began = self._publication, time.monotonic()
        publication.check_lease()
        check()
        write(stage_checkpoint(publication.run, step, self._ranks))
        self._ranks.barrier()  # all have written
        self._written = time.monotonic()
        origin = Origin(config_hash(publication.config.as_flat()), publication.image_digest)
        self._pending = PendingCheckpoint(
            publication.run, step, self._ranks, origin, publication.check_lease, after=self._rotate
        )
        self.saved_step = step

    def review_publication(self) -> None:
        """Report the checkpoint on its way if it is published by now, or raise what prevented that. Does not wait."""
        if self._pending is not None and self._pending.is_over:
            self._wait()

    def await_publication(self) -> None:
        """Wait until the checkpoint on its way is published. Collective."""
        self._wait()
        self._ranks.barrier()  # rank 0 holds the board, and its end could end the job

    def await_publication_after_failure(self) -> None:
        """Wait for the checkpoint on its way before this process ends by an error. Not collective; never raises."""
        try:
            self._wait()
        except Exception as error:
            logger.warning("the checkpoint of step %s is not published: %s", self.saved_step, error)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.wait()
        if pending.published_at is not None:
            self._report(pending.step, pending.published_at - self._began)

    def _report(self, step: int, seconds: float) -> None:
        written = self._written - self._began
        logger.info("checkpoint of step %d published: written in %.1f s, on disk after %.1f s", step, written, seconds)
        self._publication.report_published(step)
        notice = self._publication.notice_seconds
        if self._is_first and notice is not None and seconds > _SHARE_OF_NOTICE * notice:
            logger.warning(
                "a save takes %.0f s, but this job ends %d s after it is told to save: the steps since the checkpoint "
                "before it may be lost; state signal_seconds: %d or more in the cluster profile",
                seconds, notice, 60 * math.ceil(2 * seconds / 60),
            )  # fmt: skip
        self._is_first = False

    def _rotate(self) -> None:
        """Delete old checkpoints. Whatever is wrong with one of them, it does not end the training."""
        run = self._publication.run
        try:
            rotate(run, self._publication.config.training.save_total_limit, unscored_steps(run))
        except (OSError, CheckpointError) as error:
            logger.warning("old checkpoints are not deleted: %s", error)


def signal_notice(environ: Mapping[str, str]) -> int | None:
    """Read how long before the end of its job this process is told to save, in seconds; None where nobody says."""
    text = environ.get(_SIGNAL_SECONDS, "")
    return int(text) if text.isdecimal() else None


class _StoreBoard:
    """The key-value store by which the ranks found each other: any thread may use it, beside any collective."""

    def post(self, key: str, text: str) -> None:
        _get_default_store().set(f"bbu/{key}", text)

    def read(self, key: str) -> str | None:
        store = _get_default_store()
        try:
            return store.get(f"bbu/{key}").decode() if store.check([f"bbu/{key}"]) else None
        except dist.DistError as error:
            raise CheckpointError(f"rank 0 no longer answers, so {key} is not published; see its message") from error


def _shared_board() -> Board:
    return _StoreBoard() if dist.is_initialized() else LocalBoard()
