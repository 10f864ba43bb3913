"""A gradient that is not finite stops the run or costs one step, as configured; norms are those before clipping."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bbu.config.read import load_config
from bbu.errors import NonFiniteError
from bbu.training.stability import GradientGuard, find_non_finite


class GuardedOptimizer:
    """AdamW on two parameters in two groups, with a guard on every step."""

    def __init__(self, **settings: object) -> None:
        training = dataclasses.replace(load_config("smoke").training, **settings)
        self.steps_done = 0
        self.guard = GradientGuard(training, reduce_on=None, step=lambda: self.steps_done)
        self.weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        groups = [{"params": [w], "group": name} for w, name in zip(self.weights, ("llm", "vision"), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, 0.1)
        self.optimizer.register_step_pre_hook(self.guard)

    def step(self, llm: float, vision: float = 1.0) -> None:
        """Step with these values in all gradients of the two groups."""
        for weight, value in zip(self.weights, (llm, vision), strict=True):
            weight.grad = torch.full_like(weight, value)
        self.optimizer.step()
        self.steps_done += 1


def test_norms_are_per_group_and_undo_the_clipping():
    guarded = GuardedOptimizer()
    guarded.step(3.0, 4.0)
    assert guarded.guard.norms(1.0) == pytest.approx({"gn/llm": 3 * 2**0.5, "gn/vision": 4 * 3**0.5})
    assert guarded.guard.norms(2.0)["gn/llm"] == pytest.approx(6 * 2**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_ends_the_run_before_any_weight_is_touched(value: float):
    guarded = GuardedOptimizer(nan_policy="stop")
    with pytest.raises(NonFiniteError, match="step 1: a gradient is NaN or infinite"):
        guarded.step(value)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in guarded.weights)


def test_skip_leaves_all_weights_for_one_step_and_continues():
    guarded = GuardedOptimizer(nan_policy="skip", nan_max_skips=2)
    guarded.step(float("nan"))
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in guarded.weights)
    guarded.step(1.0)
    assert all((weight < 1).all() and torch.isfinite(weight).all() for weight in guarded.weights)


def test_too_many_skips_in_a_row_stop_the_run_but_separate_ones_do_not():
    guarded = GuardedOptimizer(nan_policy="skip", nan_max_skips=2)
    for value in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        guarded.step(value)
    with pytest.raises(NonFiniteError, match="3 step"):
        guarded.step(float("nan"))


def test_a_parameter_without_gradient_is_no_obstacle():
    guarded = GuardedOptimizer()
    guarded.weights[0].grad = None
    guarded.weights[1].grad = torch.ones(3)
    guarded.optimizer.step()
    assert "gn/vision" in guarded.guard.norms(1.0)


def test_rates_are_those_of_the_step():
    guarded = GuardedOptimizer()
    guarded.optimizer.param_groups[0]["lr"] = 0.5
    guarded.step(1.0)
    guarded.optimizer.param_groups[0]["lr"] = 0.25  # as a schedule does after the step
    assert guarded.guard.rates == {"lr/llm": 0.5, "lr/vision": 0.1}


class Normed(torch.nn.Module):
    """A model with parameters of two dtypes, one of them frozen, an empty one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.full((2,), 60000.0, dtype=torch.float16), requires_grad=False)
        self.empty = torch.nn.Parameter(torch.ones(0))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "frozen", "mean", "the optimizer's exp_avg"])
def test_a_value_that_is_not_finite_is_found_wherever_a_checkpoint_would_hold_it(name: str, value: float):
    model = Normed()
    optimizer = torch.optim.AdamW([model.weight])
    model.weight.grad = torch.ones(3)
    optimizer.step()
    assert find_non_finite(model, optimizer) is None
    holders = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    holders["the optimizer's exp_avg"] = optimizer.state[model.weight]["exp_avg"]
    holders[name].data[-1] = value
    assert find_non_finite(model, optimizer) == name
