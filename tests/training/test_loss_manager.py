"""Losses are weighed once, normalised by global counts, and logged as means over window and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bbu.config.read import load_config
from bbu.losses.language import _split_by_role
from bbu.training.loss_manager import LossManager, LossSum, global_counts, language_losses

LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
TEACHER = torch.tensor([True, False, False, True, False, False, False])
SHARDS = {0: [slice(0, 1), slice(1, 4)], 1: [slice(4, 5), slice(5, 7)]}
"""What two ranks hold in two micro-batches each: 4 and 3 tokens; rank 1 has no teacher."""


def make_manager(*, detection: bool = False, teacher: float = 0.5) -> LossManager:
    config = load_config("smoke")
    return LossManager(
        dataclasses.replace(config.training, teacher_loss_weight=teacher, student_loss_weight=1.0),
        dataclasses.replace(
            config.detection,
            detection_enabled=detection,
            detection_bbox_weight=5.0,
            detection_aux_weight=0.5,
            detection_loss_weight=0.1,
        ),
    )


def language_sums_of(values: torch.Tensor, where: slice) -> dict[str, LossSum]:
    return language_losses(_split_by_role(values[where], TEACHER[where]))


def loss_sum(total: float, count: int) -> LossSum:
    return LossSum(torch.tensor(total), torch.tensor(count))


def test_the_window_is_a_mean_over_tokens_under_the_names_of_the_log():
    losses = make_manager()
    for shards in SHARDS.values():
        for where in shards:
            losses.update(language_sums_of(LOSSES, where))
    assert losses.window_means() == pytest.approx(
        {"lm_loss": 28 / 7, "teacher_lm_loss": 5 / 2, "student_lm_loss": 23 / 5}
    )


def test_a_new_window_leaves_out_losses_without_terms():
    losses = make_manager()
    losses.update(language_sums_of(LOSSES, slice(0, 4)))
    losses.window_means()
    assert losses.window_means() == {}
    losses.update(language_sums_of(LOSSES, slice(4, 7)))
    assert losses.window_means() == pytest.approx({"lm_loss": 6.0, "student_lm_loss": 6.0})


def test_the_objective_weighs_roles_and_the_head():
    losses = make_manager(detection=True)
    parts = {
        **language_sums_of(LOSSES, slice(0, 7)),
        "bbox_l1_loss": loss_sum(8.0, 2),
        "bbox_l1_loss_aux0": loss_sum(4.0, 2),
    }
    objective = losses.objective(parts, {"lm_tokens": 7.0, "boxes": 2.0})
    assert float(objective) == pytest.approx((0.5 * 5 + 23) / 7 + 0.1 * 5.0 * (8 / 2 + 0.5 * 4 / 2))
    losses.update(parts)
    assert losses.window_means()["bbox_l1_loss"] == pytest.approx(4.0)  # unweighted, last layer only


def test_a_loss_that_is_not_trained_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(KeyError, match="student_lm_loss"):
        make_manager(detection=False).objective({"caption_loss": loss_sum(1.0, 1)}, {"caption_tokens": 1.0})


def test_counts_are_at_least_one():
    assert global_counts({"boxes": 0, "lm_tokens": 7}) == {"boxes": 1.0, "lm_tokens": 7.0}


def compute_in_one_process() -> tuple[dict[str, float], torch.Tensor]:
    """Window means and gradient of one process that sees all tokens at once."""
    losses, scale = make_manager(), torch.ones((), requires_grad=True)
    parts = language_sums_of(LOSSES * scale, slice(0, 7))
    losses.objective(parts, global_counts({"lm_tokens": 7})).backward()
    losses.update(parts)
    assert scale.grad is not None
    return losses.window_means(), scale.grad


def run_rank(rank: int, rendezvous: str, results: str) -> None:
    """Train and log on one of two ranks; writes its window means and its gradient under DDP to `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    losses, scale = make_manager(), torch.nn.Parameter(torch.ones(()))
    tokens = sum(len(LOSSES[where]) for where in SHARDS[rank])
    normalisers = global_counts({"lm_tokens": tokens})
    for where in SHARDS[rank]:
        parts = language_sums_of(LOSSES * scale, where)
        losses.objective(parts, normalisers, world_size=2).backward()
        losses.update(parts)
    assert scale.grad is not None
    dist.all_reduce(scale.grad)
    torch.save((losses.window_means(), scale.grad / 2), f"{results}/{rank}.pt")  # DDP's mean over ranks
    dist.destroy_process_group()


def test_two_ranks_log_and_learn_the_same_as_one_process(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)  # pyright: ignore
    means, gradient = compute_in_one_process()
    for rank in range(2):
        rank_means, rank_gradient = torch.load(tmp_path / f"{rank}.pt")
        assert rank_means == pytest.approx(means)
        torch.testing.assert_close(rank_gradient, gradient)
