"""Which samples make up which batch: a function of (seed, epoch) alone, split over ranks without waste.

Step by step the ranks together take the next `world_size * batch_size` samples of one common order, so N ranks
of batch B see what one rank of batch N*B sees, and accumulation only cuts the same order elsewhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of one rank. `set_epoch` picks the order and tells `on_epoch`, usually the dataset, too."""

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
        # Dropping the only batch would leave nothing to train on.
        self._drop_last = drop_last and samples >= batch_size * world_size
        self._on_epoch = on_epoch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(self._samples, self._batch_size * self._world_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self._samples, self._seed, self._epoch, self._shuffle)
        size = self._batch_size * self._world_size
        for start in range(0, len(self) * size, size):
            yield rank_share(order[start : start + size], order, self._rank, self._world_size)


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The common order of all ranks."""
    order = list(range(samples))
    if shuffle:
        random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def rank_share(batch: list[int], order: list[int], rank: int, world_size: int) -> list[int]:
    """A rank's contiguous part of a global batch, parts equal to within one sample.

    A rank may not go without: every collective waits for it. Where there are fewer samples than ranks, the first
    samples of the epoch are taken once more.
    """
    if len(batch) < world_size:
        batch = batch + [order[i % len(order)] for i in range(world_size - len(batch))]
    share, rest = divmod(len(batch), world_size)
    start = rank * share + min(rank, rest)
    return batch[start : start + share + (rank < rest)]


class EpochDataLoader(DataLoader[Any]):
    """A DataLoader over an EpochBatchSampler that a Trainer can tell the epoch."""

    def __init__(self, dataset: Dataset[Any], batch_sampler: EpochBatchSampler, **loading: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **loading)

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, EpochBatchSampler)
        self.batch_sampler.set_epoch(epoch)


def eval_batches(samples: int, batch_size: int, rank: int, world_size: int) -> tuple[list[list[int]], int]:
    """One rank's batches of an evaluation, and how many of them count.

    Every sample counts once, and all ranks run the same number of batches: a rank that has run out repeats the
    first sample without counting it.
    """
    own = list(range(samples))[rank::world_size]
    batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    steps = math.ceil(math.ceil(samples / world_size) / batch_size)
    return batches + [[0]] * (steps - len(batches)), len(batches)
