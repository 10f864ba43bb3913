"""Where a checkpoint stands in the training data."""

from __future__ import annotations

from bbu.data.packing import PackingBatchSampler, SampleCost
from bbu.training.position import is_same_cut, measure_position

NAMES = [f"{index}.jpg" for index in range(4)]


def packing_sampler(epochs: int) -> PackingBatchSampler:
    """Four samples, of which two fit into a row in the first epoch and one in the second."""
    return PackingBatchSampler(
        lambda epoch: [SampleCost(60 if epoch else 50, 4)] * len(NAMES), epochs=lambda rows: epochs,
        max_total_length=100, buffer_size=8, vision_weight=0.25, seed=1, shuffle=True,
    )  # fmt: skip


def test_the_end_of_a_run_has_a_position_although_one_more_epoch_would_not_fit_its_plan():
    sampler = packing_sampler(epochs=1)
    position = measure_position(sampler, NAMES, len(sampler), accumulation=1)
    assert (position.epoch, position.batches, position.seen) == (1, 0, ())
    assert is_same_cut(position, packing_sampler(epochs=1), NAMES, accumulation=1)
    assert not is_same_cut(position, packing_sampler(epochs=2), NAMES, accumulation=1)
