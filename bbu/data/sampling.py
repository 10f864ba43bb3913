"""Decides which samples form which batch of which rank, from seed and epoch alone.

In each step the ranks together take the next `world_size * batch_size` samples of one common order. So N ranks with
batches of B samples see what one rank with batches of N * B samples sees, and accumulation only cuts the same order at
other places.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of one rank. `set_epoch` selects the order of an epoch and calls `on_epoch`, usually of the dataset."""

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        assert samples > 0 and batch_size > 0 and 0 <= rank < world_size
        self._samples, self._batch_size = samples, batch_size
        self._seed, self._shuffle = seed, shuffle
        self._rank, self._world_size = rank, world_size
        # The only batch is never dropped: nothing would be left to train on.
        self._drop_last = drop_last and samples >= batch_size * world_size
        self._on_epoch = on_epoch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose batches the next iteration yields."""
        self._epoch = epoch
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(self._samples, self._batch_size * self._world_size)
        return full + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self._samples, self._seed, self._epoch, self._shuffle)
        size = self._batch_size * self._world_size
        for start in range(0, len(self) * size, size):
            yield _rank_share(order[start : start + size], order, self._rank, self._world_size)


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the samples in an epoch, which all ranks share."""
    order = list(range(samples))
    if shuffle:
        random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def _rank_share(batch: list[int], order: list[int], rank: int, world_size: int) -> list[int]:
    """The contiguous part of a global batch that one rank takes; the parts differ by one sample at most.

    A rank must not be without a sample, because every collective operation waits for it. With fewer samples than ranks,
    the first samples of the epoch are taken a second time.
    """
    if len(batch) < world_size:
        batch = batch + [order[i % len(order)] for i in range(world_size - len(batch))]
    share, rest = divmod(len(batch), world_size)
    start = rank * share + min(rank, rest)
    return batch[start : start + share + (rank < rest)]


class EpochDataLoader(DataLoader[Any]):
    """A DataLoader over an EpochBatchSampler, with the `set_epoch` that Trainer calls."""

    def __init__(self, dataset: Dataset[Any], batch_sampler: EpochBatchSampler, **loading: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **loading)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the sampler."""
        assert isinstance(self.batch_sampler, EpochBatchSampler)
        self.batch_sampler.set_epoch(epoch)


def eval_batches(samples: int, batch_size: int, rank: int, world_size: int) -> tuple[list[list[int]], int]:
    """Batches of one rank in an evaluation, and the number of them that count.

    Every sample counts once. All ranks run the same number of batches: a rank that has no samples left runs the first
    sample again without counting it.

    Args:
        samples: number of samples to evaluate.
        batch_size: most samples of a batch.
        rank, world_size: this rank and the number of ranks.
    """
    indices = list(range(samples))[rank::world_size]
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    steps = math.ceil(math.ceil(samples / world_size) / batch_size)
    return batches + [[0]] * (steps - len(batches)), len(batches)
