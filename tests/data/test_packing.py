"""Packed rows: every sample once, never too long, the same everywhere, and shared fairly among ranks."""

from __future__ import annotations

import random

import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from bbu.data.dataset import load_dataset
from bbu.data.packing import (
    PackingBatchSampler,
    SampleCost,
    _best_fit_decreasing,
    _choose_for_row,
    _group_rows_by_cost,
    _pack,
    _split_costliest_rows,
)
from bbu.data.sampling import EpochDataLoader, epoch_order
from bbu.errors import DataError

LIMIT = 100


def drawn_costs(samples: int, seed: int = 0, most: int = LIMIT):
    """Lengths that change with the epoch, as drawn teachers make them."""

    def costs_of_epoch(epoch: int) -> list[SampleCost]:
        rng = random.Random(f"{seed}/{epoch}")
        return [SampleCost(rng.randint(1, most), rng.randint(4, 400)) for _ in range(samples)]

    return costs_of_epoch


def samplers(costs_of_epoch, ranks: int = 1, *, buffer: int = 32, **more) -> list[PackingBatchSampler]:
    options = {
        "epochs": lambda rows: 4, "max_total_length": LIMIT, "buffer_size": buffer, "vision_weight": 0.25,
        "seed": 7, "shuffle": True, "world_size": ranks, **more,
    }  # fmt: skip
    return [PackingBatchSampler(costs_of_epoch, rank=rank, **options) for rank in range(ranks)]


def steps(rank_samplers: list[PackingBatchSampler], epoch: int) -> list[list[list[int]]]:
    """[step][rank] -> indices of a row."""
    for sampler in rank_samplers:
        sampler.set_epoch(epoch)
    return [list(step) for step in zip(*rank_samplers, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 40), st.integers(1, LIMIT), st.integers(0, 9), st.booleans()
)
def test_every_epoch_of_the_plan_has_every_sample_in_equally_many_rows(samples, ranks, buffer, most, seed, shuffle):
    costs_of_epoch = drawn_costs(samples, seed, most)
    rank_samplers = samplers(costs_of_epoch, ranks, buffer=buffer, shuffle=shuffle)
    for epoch in range(4):
        rows = [row for step in steps(rank_samplers, epoch) for row in step]
        seen = sorted(index for row in rows for index in row)
        assert {len(sampler) for sampler in rank_samplers} == {len(rows) // ranks}
        assert all(row and sum(costs_of_epoch(epoch)[i].tokens for i in row) <= LIMIT for row in rows)
        assert set(seen) == set(range(samples))
        # Once more only where there are fewer samples than rows to keep all ranks busy.
        assert len(seen) == max(samples, len(rows)) and (len(seen) == samples or len(seen) - samples < ranks)


def test_rows_are_a_function_of_seed_and_epoch():
    costs_of_epoch = drawn_costs(50)
    first, again = steps(samplers(costs_of_epoch, 2), 1), steps(samplers(costs_of_epoch, 2), 1)
    assert first == again != steps(samplers(costs_of_epoch, 2, seed=8), 1)
    assert first != steps(samplers(costs_of_epoch, 2), 2)


def test_a_resumed_epoch_continues_where_it_stopped():
    class Squares:
        def __getitem__(self, index: int) -> int:
            return index * index

        def __len__(self) -> int:
            return 30

    epochs: list[int] = []
    loader = EpochDataLoader(Squares(), samplers(drawn_costs(30), on_epoch=epochs.append)[0], collate_fn=list)
    loader.set_epoch(2)
    rest = list(loader)[3:]
    assert rest and list(skip_first_batches(loader, 3)) == rest and epochs == [2]


def skewed(epoch: int) -> list[SampleCost]:
    """Equally long, but a tenth of them with many images."""
    return [SampleCost(20, 4000 if i % 10 == 0 else 40) for i in range(400)]


def waiting(rows_of_steps: list[list[list[int]]]) -> float:
    """Share of the ranks' time spent waiting for the slowest of each step."""
    costs = [[sum(skewed(0)[i].tokens + 0.25 * skewed(0)[i].patches for i in row) for row in s] for s in rows_of_steps]
    return 1 - sum(sum(step) for step in costs) / sum(max(step) * len(step) for step in costs)


def test_ranks_wait_less_than_with_rows_as_they_come():
    balanced = steps(samplers(skewed, 4, buffer=400), 0)
    rows = _pack([20] * 400, random.Random(0).sample(range(400), 400), LIMIT, 400)
    naive = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    assert waiting(balanced) < waiting(naive) / 3


def test_rows_are_even_where_the_ranks_need_more_than_the_samples_do():
    costs_of_epoch = drawn_costs(300, most=30)
    rows = [row for step in steps(samplers(costs_of_epoch, 32, buffer=300), 0) for row in step]
    lengths = [sum(costs_of_epoch(0)[index].tokens for index in row) for row in rows]
    assert len(rows) == 64 > len(_pack([c.tokens for c in costs_of_epoch(0)], range(300), LIMIT, 300))
    assert sum(lengths) / (len(lengths) * max(lengths)) > 0.95


def test_no_rank_always_takes_the_costliest_row():
    costs_of_epoch = drawn_costs(200)
    costs = [
        [sum(costs_of_epoch(0)[i].tokens + 0.25 * costs_of_epoch(0)[i].patches for i in row) for row in step]
        for step in steps(samplers(costs_of_epoch, 2), 0)
    ]
    assert {first > second for first, second in costs} == {True, False}


def test_rows_are_well_filled():
    costs_of_epoch = drawn_costs(500, most=60)
    for epoch in range(4):
        rows = [row for step in steps(samplers(costs_of_epoch, buffer=128), epoch) for row in step]
        tokens = sum(costs_of_epoch(epoch)[index].tokens for row in rows for index in row)
        assert tokens / (len(rows) * LIMIT) > 0.95


def test_without_shuffling_steps_keep_their_order():
    planned = steps(samplers(lambda epoch: [SampleCost(50, 4)] * 8, shuffle=False, buffer=2), 0)
    assert planned == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]


def test_the_number_of_epochs_follows_from_the_rows_of_the_first_one():
    costs_of_epoch, first_rows = drawn_costs(40), []
    samplers(costs_of_epoch, epochs=lambda rows: first_rows.append(rows) or 2)
    tokens = [cost.tokens for cost in costs_of_epoch(0)]
    assert first_rows == [len(_pack(tokens, epoch_order(40, 7, 0, True), LIMIT, 32))]


def test_an_epoch_beyond_the_plan_is_refused_where_it_does_not_fit():
    sampler = samplers(lambda epoch: [SampleCost(30 if epoch < 2 else 90, 4)] * 12, epochs=lambda rows: 2)[0]
    assert len(steps([sampler], 1)) == 4
    with pytest.raises(DataError, match="epoch 2 needs 12 packed rows but 4 were planned"):
        steps([sampler], 2)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match=r"sample 1 has 101 tokens in epoch 0 but max_total_length is 100"):
        samplers(lambda epoch: [SampleCost(5, 4), SampleCost(101, 4)])


def test_a_row_is_filled_to_its_last_token_with_the_samples_that_wait_longest():
    assert _choose_for_row([40, 30, 25, 31, 35], LIMIT) == [0, 2, 4]
    assert _choose_for_row([40, 30, 30, 30, 30], LIMIT) == [0, 1, 2]
    assert _choose_for_row([95, 10], LIMIT) == _choose_for_row([LIMIT, 1], LIMIT) == _choose_for_row([3], LIMIT) == [0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=9))
def test_no_choice_of_samples_fills_a_row_further(lengths: list[int]):
    sums = {lengths[0]}
    for length in lengths[1:]:
        sums |= {total + length for total in sums}
    best = max(total for total in sums if total <= LIMIT)
    assert sum(lengths[position] for position in _choose_for_row(lengths, LIMIT)) == best


@pytest.mark.parametrize("most", [25, 60, LIMIT])
def test_rows_are_at_most_those_of_best_fit_decreasing(most: int):
    """And with several samples in a row, at most one more than their tokens need."""
    tokens = [cost.tokens for cost in drawn_costs(600, most=most)(0)]
    rows = _pack(tokens, epoch_order(600, 7, 0, True), LIMIT, 600)
    assert len(rows) <= len(_best_fit_decreasing(tokens, range(600), LIMIT))
    assert most > 25 or len(rows) <= sum(tokens) / LIMIT + 2


def test_best_fit_takes_the_fullest_row_with_room():
    tokens = [60, 50, 40, 45]
    assert _best_fit_decreasing(tokens, [0, 1, 2, 3], LIMIT) == [[0, 2], [1, 3]]


def test_spreading_halves_the_costliest_row_and_stops_at_single_samples():
    assert sorted(_split_costliest_rows([[0, 1], [2, 3]], [9.0, 8.0, 1.0, 1.0], 3)) == [[0], [1], [2, 3]]
    assert sorted(_split_costliest_rows([[0, 1], [2]], [0.0, 0.0, 0.0], 9)) == [[0], [1], [2]]


def test_steps_hold_rows_of_like_cost():
    assert _group_rows_by_cost([[0], [1], [2], [3]], [1.0, 9.0, 2.0, 8.0], 2) == [[[1], [3]], [[2], [0]]]


def test_a_samples_cost_is_that_of_the_sample_itself(make_config, tokenizer, processor):
    dataset = load_dataset(make_config(teacher_ratio=0.7), tokenizer, processor, split="train", seed=3, max_length=4096)
    for epoch in range(3):
        dataset.set_epoch(9)
        costs = [dataset.cost(index, epoch) for index in range(len(dataset))]
        dataset.set_epoch(epoch)
        built = [dataset[index] for index in range(len(dataset))]
        assert costs == [SampleCost(len(s), len(s.pixel_values)) for s in built]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("multiple", [1, 3])
def test_an_epoch_continued_under_another_cut_packs_what_is_left_once(multiple: int, ranks: int):
    costs_of_epoch = drawn_costs(60)
    (before,) = samplers(costs_of_epoch, 1)
    seen = before.seen_in(1, 9)
    rank_samplers = samplers(costs_of_epoch, ranks, buffer=8)
    (done,) = {sampler.continue_epoch(1, seen, multiple) for sampler in rank_samplers}
    rows = steps(rank_samplers, 1)
    assert done % multiple == 0 and not any(row for step in rows[:done] for row in step)
    rest = [row for step in rows[done:] for row in step]
    assert all(row and sum(costs_of_epoch(1)[index].tokens for index in row) <= LIMIT for row in rest)
    dealt = [index for row in rest for index in row]
    assert set(dealt) == set(range(60)) - seen and len(dealt) - len(set(dealt)) < ranks
    assert all(row for step in steps(rank_samplers, 2) for row in step)
