"""Decides which samples share a packed row, and which rank gets which row, from seed and epoch alone.

The samples of an epoch are shuffled. Two ways of packing them are tried, and the one that needs fewer rows is taken:
each row is filled to its last tokens with samples that come next, which is within a row or two of the optimum where a
row holds several samples; best-fit-decreasing is better where it holds one or two. Rows of similar cost then form a
step, so that no rank waits long for another.

Trainer plans its steps from one number of rows, but teachers are drawn anew in each epoch and change the lengths. So
all epochs of the run are packed once at the start, without decoding an image, and the epoch with the most rows sets
the number of rows of all. The other epochs make their rows a little shorter. The cost: the rows of those epochs are not
quite full. A run that is resumed with more epochs may get other rows; it then packs the samples
that its epoch has not seen.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from bbu.data.sampling import EpochBatchSampler
from bbu.errors import DataError

_Rows = list[list[int]]
"""Indices of samples, one list for each packed row."""
_LOOKAHEAD = 64
"""Samples that may complete a row; twice as many made no fuller rows of the demo's and the real data's lengths."""
_FULL_ENOUGH = 1000
"""A row is full when less than this part of it, 0.1 %, is free. Filling to the last token would use up those samples
first that fit everywhere."""

_MARGINS = (0.0025, 0.01, 0.02, 0.04)
"""How much longer than the mean the longest of even rows may be: the least of these with which they fit."""


@dataclass(frozen=True)
class SampleCost:
    """What one sample costs."""

    tokens: int
    """Tokens of the language model."""
    patches: int
    """Patches of the vision tower."""


class PackingBatchSampler(EpochBatchSampler):
    """Packed rows of one rank: every sample once an epoch, and the same number of rows in every epoch on every rank."""

    def __init__(
        self,
        sample_costs: Callable[[int], Sequence[SampleCost]],
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
        """Pack all epochs of the run and plan the number of rows.

        Args:
            sample_costs: given an epoch, the cost of each sample; must not depend on the epoch that is set.
            epochs: given a number of rows per rank and epoch, how many epochs the run takes.
            max_total_length: most tokens of a row.
            buffer_size: samples that are packed together.
            vision_weight: how many tokens one patch counts as when the costs of rows are compared.
            seed, shuffle: as of EpochBatchSampler.
            rank, world_size: this rank and the number of ranks.
            on_epoch: called with each epoch that is set.

        Raises:
            DataError: a sample is longer than a row.
        """
        costs = lru_cache(maxsize=1)(sample_costs)  # an epoch's are asked for several times in a row
        super().__init__(
            len(costs(0)), 1, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, on_epoch=on_epoch
        )
        assert max_total_length > 0 and buffer_size > 0 and vision_weight >= 0
        self._sample_costs, self._capacity = costs, max_total_length
        self._buffer_size, self._vision_weight = buffer_size, vision_weight
        self._planned: dict[tuple[int, int], list[_Rows]] = {}
        # Fewer rows per epoch mean more epochs. The first epoch alone has at most as many rows as the final plan, so
        # it asks for at least as many epochs as the run will take, and none is left out of the plan.
        self._rows = self._needed_batches(0, self._order(0))
        fewest = (self._needed_batches(epoch, self._order(epoch)) for epoch in range(1, epochs(self._rows)))
        self._rows = max(self._rows, *fewest, 1)

    def __len__(self) -> int:
        return self._rows

    def continue_epoch(self, epoch: int, seen: Collection[int], multiple: int) -> int:
        unseen = [index for index in self._order(epoch) if index not in seen]
        self._rows = max(self._rows, self._needed_batches(epoch, unseen))  # they may pack a little worse than all
        return super().continue_epoch(epoch, seen, multiple)

    def _needed_batches(self, epoch: int, samples: Sequence[int]) -> int:
        rows = self._packed_rows(epoch, samples, self._sample_costs(epoch))
        return math.ceil(len(rows) / self._world_size)

    def _deal(self, epoch: int, samples: Sequence[int], count: int) -> list[_Rows]:
        """Plan once what each epoch is asked for several times: the steps, for each step one row of every rank."""
        key = (epoch, len(samples))
        if key not in self._planned:
            self._planned = {key: self._plan(epoch, samples, count * self._world_size)}
        return self._planned[key]

    def _packed_rows(self, epoch: int, samples: Sequence[int], costs: Sequence[SampleCost]) -> _Rows:
        """The rows of some samples of an epoch, as few as possible."""
        return _pack(self._tokens(epoch, costs), samples, self._capacity, self._buffer_size)

    def _tokens(self, epoch: int, costs: Sequence[SampleCost]) -> list[int]:
        """The lengths of all samples; raises DataError for one longer than a row."""
        for index, cost in enumerate(costs):
            if cost.tokens > self._capacity:
                raise DataError(
                    f"sample {index} has {cost.tokens} tokens in epoch {epoch} but max_total_length is "
                    f"{self._capacity}; raise it or lower model_max_length"
                )
        return [cost.tokens for cost in costs]

    def _plan(self, epoch: int, samples: Sequence[int], planned: int) -> list[_Rows]:
        """The steps of an epoch, with the planned number of rows; raises DataError where that is too small."""
        costs = self._sample_costs(epoch)
        weights = [cost.tokens + self._vision_weight * cost.patches for cost in costs]
        rows = _pack_evenly(self._tokens(epoch, costs), samples, self._capacity, self._buffer_size, planned)
        if len(rows) > planned:
            raise DataError(
                f"epoch {epoch} needs {len(rows)} packed rows but {planned} were planned for the epochs before it; "
                "start again with as many epochs as the run shall take"
            )
        # Split rows until every rank has as many as planned.
        rows = _split_costliest_rows(rows, weights, planned)
        # A rank must not be without a row, because every collective operation waits for it: with fewer samples than
        # rows some samples come twice.
        order = self._order(epoch)
        rows += [[order[i % len(order)]] for i in range(planned - len(rows))]
        steps = _group_rows_by_cost(rows, weights, self._world_size)
        return self._shuffled(steps, epoch) if self._shuffle else sorted(steps, key=_first_sample)

    def _shuffled(self, steps: list[_Rows], epoch: int) -> list[_Rows]:
        """Shuffle the steps, and the rows within each; otherwise rank 0 would always get the costliest row."""
        rng = random.Random(f"{self._seed}/rows/{epoch}")
        return [rng.sample(step, len(step)) for step in rng.sample(steps, len(steps))]


def _pack_evenly(tokens: Sequence[int], order: Sequence[int], capacity: int, buffer_size: int, count: int) -> _Rows:
    """Pack rows of about the same length where `count` rows are more than needed; else as `_pack`.

    Ranks with full rows would wait for nothing, and those with the rest would wait for them.
    """
    mean, longest = sum(tokens[i] for i in order) / count, max((tokens[i] for i in order), default=0)
    lengths = [math.ceil(mean * (1 + margin)) for margin in _MARGINS]
    for length in [length for length in lengths if longest <= length < capacity]:
        rows = _pack(tokens, order, length, buffer_size)
        if len(rows) <= count:
            return rows
    return _pack(tokens, order, capacity, buffer_size)


def _pack(tokens: Sequence[int], order: Sequence[int], capacity: int, buffer_size: int) -> _Rows:
    """Pack the samples of `order` into rows of at most `capacity` tokens, `buffer_size` samples at a time."""
    ways = (_fill_rows, _pack_windows)
    return min((pack(tokens, order, capacity, buffer_size) for pack in ways), key=len)


def _fill_rows(tokens: Sequence[int], order: Sequence[int], capacity: int, buffer_size: int) -> _Rows:
    """Pack rows one after the other: the sample that waits longest, and those behind it that fill the row."""
    rows: _Rows = []
    waiting: list[int] = []
    coming = iter(order)
    while True:
        waiting += islice(coming, min(buffer_size, _LOOKAHEAD) - len(waiting))
        if not waiting:
            return rows
        chosen = _choose_for_row([tokens[index] for index in waiting], capacity)
        rows.append([waiting[position] for position in chosen])
        waiting = [index for position, index in enumerate(waiting) if position not in chosen]


def _choose_for_row(lengths: Sequence[int], capacity: int) -> list[int]:
    """Positions of the lengths that fill a row: the first one, and of the others as early ones as possible."""
    room = capacity - lengths[0]
    # Subset sums in a whole number: bit n of sums[k] is 1 where some of the first k other lengths add up to n.
    sums = [1]
    for length in lengths[1:]:
        if sums[-1].bit_length() > room - capacity // _FULL_ENOUGH:
            break
        sums.append(sums[-1] | (sums[-1] << length) & ((2 << room) - 1))
    rest = sums[-1].bit_length() - 1  # the largest sum that fits
    chosen = [0]
    for position in range(len(sums) - 1, 0, -1):
        if not sums[position - 1] >> rest & 1:  # no sum without this one
            chosen.insert(1, position)
            rest -= lengths[position]
    return chosen


def _pack_windows(tokens: Sequence[int], order: Sequence[int], capacity: int, buffer_size: int) -> _Rows:
    """Pack windows of `buffer_size` samples by best-fit-decreasing, so that the order of rows stays random."""
    rows: _Rows = []
    carried: list[int] = []
    for start in range(0, len(order), buffer_size):
        packed = _best_fit_decreasing(tokens, [*carried, *order[start : start + buffer_size]], capacity)
        # The emptiest row is not finished: its samples are packed once more, with those of the next window.
        emptiest = min(range(len(packed)), key=lambda row: sum(tokens[i] for i in packed[row]))
        carried = packed.pop(emptiest)
        rows += packed
    return [*rows, carried] if carried else rows


def _best_fit_decreasing(tokens: Sequence[int], samples: Sequence[int], capacity: int) -> _Rows:
    """Pack the longest sample first, each into the fullest row that still has space for it."""
    rows: _Rows = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row) of every row, sorted
    for index in sorted(samples, key=lambda i: -tokens[i]):
        # The smallest space that is large enough; a tuple of one sorts before all rows with that space.
        position = bisect_left(spaces, (tokens[index],))
        if position == len(spaces):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = spaces.pop(position)
        rows[row].append(index)
        insort(spaces, (free - tokens[index], row))
    return rows


def _split_costliest_rows(rows: _Rows, weights: Sequence[float], count: int) -> _Rows:
    """Split the costliest row into halves until there are `count` rows, or every row is a single sample."""
    alone = [row for row in rows if len(row) == 1]
    heap = [(-_weight(row, weights), row) for row in rows if len(row) > 1]
    heapq.heapify(heap)
    while heap and len(heap) + len(alone) < count:
        for half in _halves(heapq.heappop(heap)[1], weights):
            if len(half) == 1:
                alone.append(half)
            else:
                heapq.heappush(heap, (-_weight(half, weights), half))
    return alone + [row for _, row in heap]


def _group_rows_by_cost(rows: _Rows, weights: Sequence[float], world_size: int) -> list[_Rows]:
    """Form steps of `world_size` rows of similar cost: neighbours in the order of cost."""
    ranked = sorted(rows, key=lambda row: _weight(row, weights), reverse=True)
    return [ranked[start : start + world_size] for start in range(0, len(ranked), world_size)]


def _halves(row: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[int]]:
    """Split a row into two parts of similar cost: the costliest sample first, each to the cheaper part."""
    parts: tuple[list[int], list[int]] = ([], [])
    for index in sorted(row, key=lambda i: -weights[i]):
        # Where the costs are equal (all may be 0) the shorter part gets the sample, so that neither part stays empty.
        min(parts, key=lambda part: (_weight(part, weights), len(part))).append(index)
    return parts


def _first_sample(step: _Rows) -> int:
    return min(index for row in step for index in row)


def _weight(row: Sequence[int], weights: Sequence[float]) -> float:
    return sum(weights[index] for index in row)
