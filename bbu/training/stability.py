"""Gradients as the optimizer is about to apply them: their norm per group, and none that is not finite.

The look is taken in the optimizer's own step hook, the one place that plain training, DDP and DeepSpeed (which
clips and steps inside its engine) have in common.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bbu.config.domains import TrainingConfig
from bbu.errors import NonFiniteError

logger = logging.getLogger(__name__)


class GradientGuard:
    """A `register_step_pre_hook` hook: stops, or skips, the step of a gradient that is not finite; keeps norms.

    sharded: every rank holds a part of the gradients (ZeRO), so squares are summed over ranks.
    step: optimizer steps done so far.
    """

    def __init__(self, config: TrainingConfig, *, sharded: bool, step: Callable[[], int]) -> None:
        self._policy, self._most_skips = config.nan_policy, config.nan_max_skips
        self._sharded, self._step = sharded, step
        self._squares: dict[str, torch.Tensor] = {}
        self._current = self._last_skipped = -2
        self._skips = 0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called before each step, by DeepSpeed once for each parameter group. Raises NonFiniteError on all ranks."""
        if self._step() != self._current:
            self._current, self._squares = self._step(), {}
        found = self._squares_of(optimizer.param_groups)
        for group, square in found.items():
            self._squares[group] = self._squares.get(group, 0) + square
        if found and not torch.isfinite(torch.stack(list(found.values()))).all():
            self._refuse(optimizer)

    def norms(self, clipped_by: float) -> dict[str, float]:
        """`gn/<group>` of the last step, as before clipping.

        clipped_by: the norm before clipping over the norm after it (1 where nothing was clipped).
        """
        return {f"gn/{group}": float(square.sqrt()) * clipped_by for group, square in self._squares.items()}

    def _squares_of(self, param_groups: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Squared norm of each learning-rate group, over all ranks. Frozen ones and empty ones are left out."""
        grads: dict[str, list[torch.Tensor]] = defaultdict(list)
        for group in param_groups:
            grads[group["group"]] += [p.grad.detach() for p in group["params"] if p.grad is not None]
        names = sorted(grads)
        device = next((p.device for group in param_groups for p in group["params"]), None)
        squares = [_square(grads[name], device) for name in names]
        if self._sharded and squares:
            joint = torch.stack(squares)
            dist.all_reduce(joint)
            squares = list(joint)
        return dict(zip(names, squares, strict=True))

    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        if self._current != self._last_skipped:
            self._skips = self._skips + 1 if self._last_skipped == self._current - 1 else 1
            self._last_skipped = self._current
        if self._policy == "stop" or self._skips > self._most_skips:
            raise NonFiniteError(
                f"step {self._current + 1}: a gradient is NaN or infinite, {self._skips} step(s) in a row; no "
                "checkpoint holds it. Lower the learning rates, or look at this step's samples, and start again"
            )
        logger.warning("step %d skipped: a gradient is NaN or infinite", self._current + 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # AdamW leaves a parameter without gradient as it is


def _square(grads: list[torch.Tensor], device: torch.device | None) -> torch.Tensor:
    """Sum of squares, 0 of none; float32 first: squares of float16 overflow."""
    if not grads:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm([grad.float() for grad in grads]).square()
