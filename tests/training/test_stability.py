"""A gradient that is not finite stops the run or costs one step, as configured; norms are told before clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from bbu.config.read import load_config
from bbu.errors import NonFiniteError
from bbu.training.stability import GradientGuard

Step = Callable[[float], None]


class Bench:
    """Two parameters in two groups under AdamW, with a guard that sees every step."""

    def __init__(self, **settings: object) -> None:
        training = dataclasses.replace(load_config("smoke").training, **settings)
        self.done = 0
        self.guard = GradientGuard(training, sharded=False, step=lambda: self.done)
        self.weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        groups = [{"params": [w], "group": name} for w, name in zip(self.weights, ("llm", "vision"), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, 0.1)
        self.optimizer.register_step_pre_hook(self.guard)

    def step(self, llm: float, vision: float = 1.0) -> None:
        for weight, value in zip(self.weights, (llm, vision), strict=True):
            weight.grad = torch.full_like(weight, value)
        self.optimizer.step()
        self.done += 1


def test_norms_are_per_group_and_undo_the_clipping():
    bench = Bench()
    bench.step(3.0, 4.0)
    assert bench.guard.norms(1.0) == pytest.approx({"gn/llm": 3 * 2**0.5, "gn/vision": 4 * 3**0.5})
    assert bench.guard.norms(2.0)["gn/llm"] == pytest.approx(6 * 2**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_ends_the_run_before_any_weight_is_touched(value: float):
    bench = Bench(nan_policy="stop")
    with pytest.raises(NonFiniteError, match="step 1: a gradient is NaN or infinite"):
        bench.step(value)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in bench.weights)


def test_skip_leaves_all_weights_for_one_step_and_goes_on():
    bench = Bench(nan_policy="skip", nan_max_skips=2)
    bench.step(float("nan"))
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in bench.weights)
    bench.step(1.0)
    assert all((weight < 1).all() and torch.isfinite(weight).all() for weight in bench.weights)


def test_too_many_skips_in_a_row_stop_but_those_apart_do_not():
    bench = Bench(nan_policy="skip", nan_max_skips=2)
    for value in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        bench.step(value)
    with pytest.raises(NonFiniteError, match="3 step"):
        bench.step(float("nan"))


def test_a_frozen_parameter_has_no_part_in_it():
    bench = Bench()
    bench.weights[0].grad = None
    bench.weights[1].grad = torch.ones(3)
    bench.optimizer.step()
    assert "gn/vision" in bench.guard.norms(1.0)
