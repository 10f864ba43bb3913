"""Gradients as the optimizer is about to apply them: their norm per group, and none that is not finite.

The optimizer's own step hook reads them, and the learning rates of the step with them. It is the one place that plain
training, DDP and DeepSpeed (which clips and steps inside its engine) have in common.

Weights and the optimizer's state are checked once more before a checkpoint holds them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bbu.config.domains import TrainingConfig
from bbu.errors import NonFiniteError
from bbu.training.parameter_manager import current_learning_rates

logger = logging.getLogger(__name__)
_NEVER = -2
"""A step before the first one (0), and not the one just before it, which would count as a skip in a row."""


class GradientGuard:
    """A `register_step_pre_hook` hook: refuses a step whose gradient is not finite, and keeps its norms and rates.

    Under nan_policy `stop` a refused step ends the run; under `skip` it changes no weight, and more than
    nan_max_skips of them in a row end the run.

    Args:
        config: nan_policy and nan_max_skips.
        reduce_on: where each rank holds a part of the gradients (ZeRO), the device on which squares are summed over
            ranks. The gradients may lie elsewhere: those of an offloaded optimizer lie in the host's memory, which
            NCCL cannot reach.
        step: returns the number of optimizer steps done so far.
    """

    def __init__(self, config: TrainingConfig, *, reduce_on: torch.device | None, step: Callable[[], int]) -> None:
        self._policy, self._max_skips = config.nan_policy, config.nan_max_skips
        self._reduce_on, self._step = reduce_on, step
        self._squares: dict[str, torch.Tensor] = {}
        self.rates: dict[str, float] = {}
        """`lr/<group>` of the last step. After it the schedule has already set those of the next one."""
        self._current = self._last_skipped = _NEVER
        self._skips = 0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look at the gradients before a step. Raises NonFiniteError on all ranks alike.

        DeepSpeed calls it once for each parameter group of a step, hence the sum over calls.
        """
        if self._step() != self._current:
            self._current, self._squares = self._step(), {}
        self.rates |= current_learning_rates(optimizer.param_groups)
        squares = self._squared_norms(optimizer.param_groups)
        for group, square in squares.items():
            self._squares[group] = self._squares.get(group, 0) + square
        if squares and not torch.isfinite(torch.stack(list(squares.values()))).all():
            self._refuse_step(optimizer)

    def norms(self, clipped_by: float) -> dict[str, float]:
        """Return `gn/<group>` of the last step, as it was before clipping.

        Args:
            clipped_by: the total norm before clipping over the total norm after it; 1 where nothing was clipped.
        """
        return {f"gn/{group}": float(square.sqrt()) * clipped_by for group, square in self._squares.items()}

    def _squared_norms(self, param_groups: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Squared norm of each learning-rate group, over all ranks; a group without any gradient is 0."""
        grads: dict[str, list[torch.Tensor]] = defaultdict(list)
        for group in param_groups:
            grads[group["group"]] += [p.grad.detach() for p in group["params"] if p.grad is not None]
        names = sorted(grads)
        device = next((p.device for group in param_groups for p in group["params"]), None)
        squares = [_sum_of_squares(grads[name], device) for name in names]
        if self._reduce_on is not None and squares:
            total = torch.stack(squares).to(self._reduce_on)
            dist.all_reduce(total)
            squares = list(total)
        return dict(zip(names, squares, strict=True))

    def _refuse_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._current != self._last_skipped:  # else another parameter group of the same step
            self._skips = self._skips + 1 if self._last_skipped == self._current - 1 else 1
            self._last_skipped = self._current
        if self._policy == "stop" or self._skips > self._max_skips:
            raise NonFiniteError(
                f"step {self._current + 1}: a gradient is NaN or infinite, {self._skips} step(s) in a row; no "
                "checkpoint holds it. Lower the learning rates, or look at this step's samples, and start again"
            )
        logger.warning("step %d skipped: a gradient is NaN or infinite", self._current + 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # AdamW leaves a parameter without gradient as it is


def find_non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Name a parameter, a buffer or a state of the optimizer that is NaN or infinite on this rank; None without any.

    Under ZeRO each rank looks at its own part of what is partitioned. The device is waited for once.
    """
    named = [(name, t.detach()) for name, t in _saved_tensors(model, optimizer) if t.is_floating_point() and t.numel()]
    if not named:
        return None
    device = named[0][1].device
    flags = torch.stack([_is_finite(tensor).to(device) for _, tensor in named]).tolist()
    return next((name for (name, _), flag in zip(named, flags, strict=True) if not flag), None)


def _saved_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, getattr(tensor, "ds_tensor", tensor)  # ZeRO-3 keeps this rank's part there
    of_model = {id(parameter) for parameter in model.parameters()}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in of_model:  # ZeRO's float32 copy
            yield "the optimizer's copy of the weights", parameter
        yield from (
            (f"the optimizer's {key}", value) for key, value in state.items() if isinstance(value, torch.Tensor)
        )


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    low, high = tensor.aminmax()  # NaN wins in both
    return torch.isfinite(low) & torch.isfinite(high)


def _sum_of_squares(grads: list[torch.Tensor], device: torch.device | None) -> torch.Tensor:
    """Sum of squares, 0 for no gradient; in float32, because squares of float16 overflow."""
    if not grads:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm([grad.float() for grad in grads]).square()
