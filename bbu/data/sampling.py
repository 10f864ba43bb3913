"""Decides which samples form which batch of which rank, from seed and epoch alone.

In each step the ranks together take the next `world_size * batch_size` samples of one common order. So N ranks with
batches of B samples see what one rank with batches of N * B samples sees, and accumulation only cuts the same order at
other places.

A run that resumes under another cut (batch size, ranks, accumulation, row length) or with other records continues the
epoch with the samples that it has not seen: `continue_epoch`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
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
        self._continued: _Continuation | None = None

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose batches the next iteration yields."""
        self._epoch = epoch
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def continue_epoch(self, epoch: int, seen: Collection[int], multiple: int) -> int:
        """Deal in an epoch only the samples that it has not seen, each once, in as many batches as they need.

        The epoch keeps its number of batches. The first ones count as done and are empty; they must be skipped. Where
        hardly any sample is left, some come a second time, so that no rank is without one.

        Args:
            epoch: the epoch to continue.
            seen: the samples that it has had.
            multiple: the number of batches that count as done is a multiple of this.

        Returns:
            The number of batches that count as done; all of them where no sample is left.
        """
        unseen = [index for index in self._order(epoch) if index not in seen]
        self._continued = _Continuation(epoch, tuple(unseen), 0)
        needed = self._needed_batches(epoch, unseen)
        done = len(self) if not needed else max(0, len(self) - needed) // multiple * multiple
        self._continued = _Continuation(epoch, tuple(unseen), done)
        return done

    def steps_of(self, epoch: int) -> list[list[list[int]]]:
        """The batches of all ranks in an epoch: step, rank, samples."""
        rest = self._continued
        if rest is not None and rest.epoch == epoch:
            empty: list[list[list[int]]] = [[[] for _ in range(self._world_size)] for _ in range(rest.done)]
            return empty + self._deal(epoch, rest.unseen, len(self) - rest.done)
        return self._deal(epoch, self._order(epoch), len(self))

    def seen_in(self, epoch: int, steps: int) -> set[int]:
        """The samples that an epoch has had after some steps of all ranks, an earlier start's included."""
        rest = self._continued
        earlier = set(range(self._samples)) - set(rest.unseen) if rest is not None and rest.epoch == epoch else set()
        return earlier | {index for step in self.steps_of(epoch)[:steps] for share in step for index in share}

    def __len__(self) -> int:
        full, rest = divmod(self._samples, self._batch_size * self._world_size)
        return full + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps_of(self._epoch):
            yield step[self._rank]

    def _order(self, epoch: int) -> list[int]:
        return epoch_order(self._samples, self._seed, epoch, self._shuffle)

    def _needed_batches(self, epoch: int, samples: Sequence[int]) -> int:
        """The fewest batches of a rank that hold some samples of an epoch."""
        full, rest = divmod(len(samples), self._batch_size * self._world_size)
        return full + (rest > 0 and not self._drop_last)

    def _deal(self, epoch: int, samples: Sequence[int], count: int) -> list[list[list[int]]]:
        """Cut samples of an epoch into `count` steps, full ones as long as they last for all."""
        order, size = self._order(epoch), self._batch_size * self._world_size
        if count > self._needed_batches(epoch, samples):  # evenly, since full steps would leave some empty
            bounds = [position * len(samples) // count for position in range(count + 1)]
        else:
            bounds = [min(position * size, len(samples)) for position in range(count + 1)]
        parts = [list(samples[start:end]) for start, end in itertools.pairwise(bounds)]
        return [_rank_shares(part, order, self._world_size) for part in parts]


@dataclass(frozen=True)
class _Continuation:
    """What is left of an epoch that an earlier start has begun."""

    epoch: int
    unseen: tuple[int, ...]
    """Samples that it has not had, in its order."""
    done: int
    """Batches that count as done."""


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the samples in an epoch, which all ranks share."""
    order = list(range(samples))
    if shuffle:
        random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def _rank_shares(batch: list[int], order: list[int], world_size: int) -> list[list[int]]:
    """The contiguous parts of a global batch that the ranks take; they differ by one sample at most.

    A rank must not be without a sample, because every collective operation waits for it. With fewer samples than ranks,
    the first samples of the epoch are taken a second time.
    """
    if len(batch) < world_size:
        batch = batch + [order[i % len(order)] for i in range(world_size - len(batch))]
    share, rest = divmod(len(batch), world_size)
    starts = [rank * share + min(rank, rest) for rank in range(world_size + 1)]
    return [batch[start:end] for start, end in itertools.pairwise(starts)]


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
