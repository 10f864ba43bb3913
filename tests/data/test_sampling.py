"""Batches: every sample once an epoch, the same for any number of ranks, anew each epoch, resumable."""

from __future__ import annotations

import pytest
from accelerate import skip_first_batches

from bbu.data.sampling import EpochBatchSampler, EpochDataLoader, eval_batches


def batches(samples: int, size: int, ranks: int = 1, epoch: int = 0, **more: bool) -> list[list[list[int]]]:
    """[step][rank] -> indices."""
    options = {"seed": 7, "shuffle": True, "world_size": ranks, **more}
    samplers = [EpochBatchSampler(samples, size, rank=rank, **options) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert len({len(sampler) for sampler in samplers}) == 1
    return [list(step) for step in zip(*samplers, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [12, 13, 23])
def test_every_sample_comes_once_an_epoch(samples: int, ranks: int):
    seen = [i for step in batches(samples, 2, ranks) for share in step for i in share]
    assert set(seen) == set(range(samples)) and len(seen) < samples + ranks


def test_ranks_together_see_what_one_rank_of_the_joint_batch_sees():
    joint = [sorted(step[0]) for step in batches(22, 4)]
    assert [sorted(i for share in step for i in share) for step in batches(22, 2, ranks=2)] == joint


def test_no_rank_is_ever_without_a_sample():
    assert all(share for step in batches(5, 2, ranks=4) for share in step)


def test_the_order_changes_with_the_epoch_and_can_be_switched_off():
    assert batches(12, 3, epoch=0) != batches(12, 3, epoch=1) == batches(12, 3, epoch=1)
    assert batches(4, 2, shuffle=False) == [[[0, 1]], [[2, 3]]]


def test_drop_last_drops_the_incomplete_batch_but_never_the_only_one():
    assert [len(step[0]) for step in batches(7, 3, drop_last=True)] == [3, 3]
    assert [len(step[0]) for step in batches(2, 3, drop_last=True)] == [2]


def test_a_resumed_epoch_continues_where_it_stopped():
    class Squares:
        def __getitem__(self, index: int) -> int:
            return index * index

        def __len__(self) -> int:
            return 10

    epochs: list[int] = []
    sampler = EpochBatchSampler(10, 2, seed=7, shuffle=True, on_epoch=epochs.append)
    loader = EpochDataLoader(Squares(), sampler, collate_fn=list)
    loader.set_epoch(3)
    rest = list(loader)[2:]
    resumed = skip_first_batches(loader, 2)
    assert list(resumed) == rest and epochs == [3]


@pytest.mark.parametrize("samples", [1, 5, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_counts_every_sample_once_in_equally_many_batches(samples: int, ranks: int):
    parts = [eval_batches(samples, 2, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches, _ in parts}) == 1
    counted = [index for batches, real in parts for batch in batches[:real] for index in batch]
    assert sorted(counted) == list(range(samples))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_epoch_continued_under_another_cut_deals_what_is_left_once(size: int, multiple: int, ranks: int):
    before = EpochBatchSampler(40, 3, seed=7, shuffle=True, world_size=2)
    seen = before.seen_in(0, 2)
    assert len(seen) == 12
    samplers = [EpochBatchSampler(40, size, seed=7, shuffle=True, rank=rank, world_size=ranks) for rank in range(ranks)]
    (done,) = {sampler.continue_epoch(0, seen, multiple) for sampler in samplers}
    shares = [list(sampler) for sampler in samplers]
    assert done % multiple == 0 and {len(batches) for batches in shares} == {len(samplers[0])}
    assert not any(batch for batches in shares for batch in batches[:done])
    rest = [batch for batches in shares for batch in batches[done:]]
    assert all(0 < len(batch) <= size for batch in rest)
    dealt = [index for batch in rest for index in batch]
    assert set(range(40)) - seen <= set(dealt)
    assert len(dealt) - 28 < (ranks if multiple == 1 else ranks * multiple)  # no rank is ever without a sample
    assert size * ranks > 2 or sorted(dealt) == sorted(set(range(40)) - seen)
    assert samplers[0].seen_in(0, len(samplers[0])) == set(range(40))
    samplers[0].set_epoch(1)
    assert all(batch for batch in samplers[0])  # the next epoch has all samples


def test_an_epoch_without_a_sample_left_is_over():
    sampler = EpochBatchSampler(10, 2, seed=7, shuffle=True)
    assert sampler.continue_epoch(0, range(10), 1) == len(sampler)
