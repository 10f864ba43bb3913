"""Which samples share a packed row, and which rank gets which row: a function of (seed, epoch) alone.

Samples are shuffled, looked at a window at a time, and packed within it by best-fit-decreasing, so that rows are
full and their order stays random. Rows of like cost then make up a step, so that no rank waits long for another.

A Trainer plans its steps from one length, but teachers are drawn anew each epoch and lengths change with them. So
all epochs of the run are packed once, without any pixel, and the worst of them sets the number of rows of every
epoch; the others split their costliest rows until they have as many. The trade-off: those epochs' rows are not quite
full, and a run that is resumed with more epochs may have other rows.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bbu.data.sampling import EpochBatchSampler, epoch_order
from bbu.errors import DataError

Rows = list[list[int]]
"""Indices of samples, one list for each packed row."""


@dataclass(frozen=True)
class SampleCost:
    """What one sample costs: tokens of the language model, patches of the vision tower."""

    tokens: int
    patches: int


class PackingBatchSampler(EpochBatchSampler):
    """Packed rows of one rank: every sample once an epoch, as many rows in every epoch and on every rank.

    lengths: what each sample costs in an epoch; must not depend on the epoch that is set.
    epochs: how many epochs the run takes if each has so many rows for this rank.
    vision_weight: tokens that one patch counts for when rows are compared.
    Raises DataError for a sample longer than a row.
    """

    def __init__(
        self,
        lengths: Callable[[int], Sequence[SampleCost]],
        *,
        epochs: Callable[[int], int],
        max_total_length: int,
        buffer_size: int,
        vision_weight: float,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(
            len(lengths(0)), 1, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, on_epoch=on_epoch
        )
        assert max_total_length > 0 and buffer_size > 0 and vision_weight >= 0
        self._lengths, self._capacity = lengths, max_total_length
        self._buffer_size, self._vision_weight = buffer_size, vision_weight
        self._planned: tuple[int, list[Rows]] | None = None
        # With fewer rows the run takes more epochs, so the first epoch's count never plans too few.
        self._rows = self._needed(0)
        self._rows = max(self._rows, *(self._needed(epoch) for epoch in range(epochs(self._rows))), 1)

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield step[self._rank]

    def steps(self) -> list[Rows]:
        """The set epoch's rows: for each step, one of every rank."""
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = self._epoch, self._plan(self._epoch)
        return self._planned[1]

    def packing_efficiency(self) -> float:
        """Share of the set epoch's rows, all ranks together, that is filled with real tokens."""
        costs, rows = self._lengths(self._epoch), [row for step in self.steps() for row in step]
        return sum(costs[index].tokens for row in rows for index in row) / (len(rows) * self._capacity)

    def _needed(self, epoch: int) -> int:
        """Rows a rank needs at least."""
        return math.ceil(len(self._pack(epoch, self._lengths(epoch))) / self._world_size)

    def _pack(self, epoch: int, costs: Sequence[SampleCost]) -> Rows:
        for index, cost in enumerate(costs):
            if cost.tokens > self._capacity:
                raise DataError(
                    f"sample {index} has {cost.tokens} tokens in epoch {epoch} but max_total_length is "
                    f"{self._capacity}; raise it or lower model_max_length"
                )
        return pack([cost.tokens for cost in costs], self._order(epoch), self._capacity, self._buffer_size)

    def _plan(self, epoch: int) -> list[Rows]:
        costs = self._lengths(epoch)
        weights = [cost.tokens + self._vision_weight * cost.patches for cost in costs]
        rows, wanted = self._pack(epoch, costs), self._rows * self._world_size
        if len(rows) > wanted:
            raise DataError(
                f"epoch {epoch} needs {len(rows)} packed rows but {wanted} were planned for the epochs before it; "
                "start again with as many epochs as the run shall take"
            )
        rows = spread(rows, weights, wanted)
        # A rank may not go without, every collective waits for it: with fewer samples than rows some come twice.
        order = self._order(epoch)
        rows += [[order[i % len(order)]] for i in range(wanted - len(rows))]
        steps = balance(rows, weights, self._world_size)
        return self._shuffled(steps, epoch) if self._shuffle else sorted(steps, key=_first)

    def _order(self, epoch: int) -> list[int]:
        return epoch_order(self._samples, self._seed, epoch, self._shuffle)

    def _shuffled(self, steps: list[Rows], epoch: int) -> list[Rows]:
        """The steps in random order, and which rank takes which row; else the first would take the costliest."""
        rng = random.Random(f"{self._seed}/rows/{epoch}")
        return [rng.sample(step, len(step)) for step in rng.sample(steps, len(steps))]


def pack(tokens: Sequence[int], order: Sequence[int], capacity: int, buffer_size: int) -> Rows:
    """Rows of at most `capacity` tokens; windows of `buffer_size` samples of `order` are packed one by one."""
    rows: Rows = []
    carried: list[int] = []
    for start in range(0, len(order), buffer_size):
        packed = best_fit_decreasing(tokens, [*carried, *order[start : start + buffer_size]], capacity)
        # The emptiest row of a window is filled up from the next.
        emptiest = min(range(len(packed)), key=lambda row: sum(tokens[i] for i in packed[row]))
        carried = packed.pop(emptiest)
        rows += packed
    return [*rows, carried] if carried else rows


def best_fit_decreasing(tokens: Sequence[int], samples: Sequence[int], capacity: int) -> Rows:
    """Longest first, each into the fullest row that can still take it."""
    rows: Rows = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(samples, key=lambda i: -tokens[i]):
        found = bisect_left(room, (tokens[index],))
        if found == len(room):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = room.pop(found)
        rows[row].append(index)
        insort(room, (free - tokens[index], row))
    return rows


def spread(rows: Rows, weights: Sequence[float], wanted: int) -> Rows:
    """Halve the costliest row again and again, until there are `wanted` or every row is a single sample."""
    alone = [row for row in rows if len(row) == 1]
    heap = [(-_weight(row, weights), row) for row in rows if len(row) > 1]
    heapq.heapify(heap)
    while heap and len(heap) + len(alone) < wanted:
        for half in _halves(heapq.heappop(heap)[1], weights):
            if len(half) == 1:
                alone.append(half)
            else:
                heapq.heappush(heap, (-_weight(half, weights), half))
    return alone + [row for _, row in heap]


def balance(rows: Rows, weights: Sequence[float], world_size: int) -> list[Rows]:
    """Steps of `world_size` rows whose costs are as near to each other as the rows allow."""
    ranked = sorted(rows, key=lambda row: _weight(row, weights), reverse=True)
    return [ranked[start : start + world_size] for start in range(0, len(ranked), world_size)]


def _halves(row: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[int]]:
    """Two parts of near equal cost: the costliest sample first, each to the lighter part."""
    parts: tuple[list[int], list[int]] = ([], [])
    for index in sorted(row, key=lambda i: -weights[i]):
        # By number where weights tie, so that neither part is ever empty.
        min(parts, key=lambda part: (_weight(part, weights), len(part))).append(index)
    return parts


def _first(step: Rows) -> int:
    return min(index for row in step for index in row)


def _weight(row: Sequence[int], weights: Sequence[float]) -> float:
    return sum(weights[index] for index in row)
