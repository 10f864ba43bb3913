"""Which parameter learns how fast: five groups, each split by weight decay, frozen where the rate is zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bbu.config.domains import TrainingConfig
from bbu.errors import ConfigError, ModelError

GROUPS = ("vision", "merger", "llm", "detection", "adapter")
"""The five groups; also the order in which a parameter shared by several is claimed."""


HEAD_GROUPS = ("detection", "adapter")
"""The groups that make up the detection head."""


@dataclass(frozen=True)
class ManagedParameter:
    """One parameter, once, under its first name."""

    name: str
    parameter: nn.Parameter
    group: str
    decays: bool


class ParameterManager:
    """Sorts a model's parameters into the five groups and makes the optimizer's parameter groups.

    Raises ModelError for a parameter that belongs to none of the groups, ConfigError where all are frozen.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, *, world_size: int = 1) -> None:
        self.learning_rates = learning_rates(config, world_size)
        self.parameters = _managed(model)
        self._weight_decay = config.weight_decay

    def freeze(self) -> None:
        """Groups with rate zero stop requiring gradients, all others require them. Call before DDP wraps."""
        for entry in self.parameters:
            entry.parameter.requires_grad_(self.learning_rates[entry.group] > 0)
        if not any(entry.parameter.requires_grad for entry in self.parameters):
            raise ConfigError("every learning rate is 0, nothing would train; give a group a rate above 0")

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Groups for `torch.optim`, at most two for each of the five; `group` and `name` say which.

        Frozen parameters are left out. Ordered by GROUPS, decaying first, so that an optimizer state that is
        loaded later meets the same order.
        """
        return [
            {
                "params": chosen,
                "lr": self.learning_rates[group],
                "weight_decay": self._weight_decay if decays else 0.0,
                "group": group,
                "name": f"{group}/{'decay' if decays else 'no_decay'}",
            }
            for group in GROUPS
            for decays in (True, False)
            if (chosen := self._trainable(group, decays))
        ]

    def members(self, group: str) -> list[nn.Parameter]:
        """All parameters of a group, frozen ones too."""
        assert group in GROUPS, group
        return [entry.parameter for entry in self.parameters if entry.group == group]

    def weight_norms(self, whole: Callable[[list[nn.Parameter]], AbstractContextManager[Any]]) -> dict[str, float]:
        """`wn/<group>`: L2 norm of the group's weights, for groups that have any.

        whole: makes parameters that ranks share whole for a block (ZeRO-3); one at a time, or the model would be.
        """
        squares: dict[str, list[torch.Tensor]] = defaultdict(list)
        for entry in self.parameters:
            with whole([entry.parameter]):
                squares[entry.group].append(entry.parameter.detach().float().square().sum())
        return {f"wn/{group}": float(torch.stack(found).sum().sqrt()) for group, found in squares.items()}

    def _trainable(self, group: str, decays: bool) -> list[nn.Parameter]:
        return [
            entry.parameter
            for entry in self.parameters
            if entry.group == group and entry.decays is decays and entry.parameter.requires_grad
        ]


def learning_rates(config: TrainingConfig, world_size: int) -> dict[str, float]:
    """Rate of each group; with auto_scale_lr times global batch size over lr_reference_batch_size.

    The linear scaling rule, Goyal et al. 2017 (arXiv:1706.02677).
    """
    stated = {group: float(getattr(config, f"{group}_lr")) for group in GROUPS}
    if not config.auto_scale_lr:
        return stated
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    factor = samples / config.lr_reference_batch_size
    return {group: rate * factor for group, rate in stated.items()}


def current_learning_rates(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`lr/<group>` as the scheduler has left them in an optimizer's `param_groups`."""
    return {f"lr/{group['group']}": float(group["lr"]) for group in param_groups}


def group_of(name: str) -> str:
    """Group of a parameter by its dotted name, whatever wraps the model; ModelError where none fits."""
    parts = name.split(".")
    if "detection_head" in parts:
        inside = parts[parts.index("detection_head") + 1 :]
        return "adapter" if any("adapter" in part for part in inside) else "detection"
    if "visual" in parts:
        return "merger" if "merger" in parts else "vision"
    if "language_model" in parts or "lm_head" in parts:
        return "llm"
    raise ModelError(f"parameter {name} belongs to none of {', '.join(GROUPS)}; name it in group_of")


def _managed(model: nn.Module) -> tuple[ManagedParameter, ...]:
    """Every parameter once. A tied one has all its names: the earliest group of GROUPS owns it."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    decay_free = set(_decay_free(model))
    return tuple(
        ManagedParameter(
            name=aliases[0],
            parameter=parameter,
            group=min(map(group_of, aliases), key=GROUPS.index),
            decays=decay_free.isdisjoint(aliases),
        )
        for parameter, aliases in names.items()
    )


def _decay_free(model: nn.Module) -> Iterator[str]:
    """Names of norms' parameters and of biases.

    By the module's class: transformers' filter goes by name and lets Qwen2.5-VL's `norm1`, `norm2` and
    `ln_q` decay.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_norm or name.endswith("bias"):  # `in_proj_bias` of attention as well
                yield f"{prefix}.{name}" if prefix else name
