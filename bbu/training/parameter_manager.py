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
from bbu.models.adapters import has_adapters, is_adapter_name
from bbu.models.groups import BASE_GROUPS, GROUPS, stated_learning_rates


@dataclass(frozen=True)
class ManagedParameter:
    """One parameter of the model; a tied one occurs once."""

    name: str
    """Its dotted name, the first one if it is tied."""
    parameter: nn.Parameter
    group: str
    """One of GROUPS."""
    decays: bool
    """Whether weight decay applies to it."""
    is_base: bool = False
    """Whether it is a weight of the base model under low-rank adapters, and so never trains."""


class ParameterManager:
    """Sorts a model's parameters into the five groups and makes the optimizer's parameter groups.

    Raises:
        ModelError: a parameter belongs to none of the groups.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, *, world_size: int = 1) -> None:
        self.learning_rates = _group_learning_rates(config, world_size)
        self.parameters = _sort_parameters(model)
        """All parameters of the model, each once."""
        self._weight_decay = config.weight_decay

    def freeze(self) -> None:
        """Let exactly what trains require gradients. Call it before DDP wraps the model.

        A group trains if its rate is above zero: with adapters the group's adapters, else its weights.

        Raises:
            ConfigError: every rate is zero.
        """
        for entry in self.parameters:
            entry.parameter.requires_grad_(not entry.is_base and self.learning_rates[entry.group] > 0)
        if not any(entry.parameter.requires_grad for entry in self.parameters):
            raise ConfigError("every learning rate is 0, nothing would train; give a group a rate above 0")

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Make the groups for `torch.optim`, at most two for each of the five; `group` and `name` say which.

        Frozen parameters are left out. The order is that of GROUPS, decaying parameters first, so that an optimizer
        state loaded later meets the same order.
        """
        return [
            {
                "params": parameters,
                "lr": self.learning_rates[group],
                "weight_decay": self._weight_decay if decays else 0.0,
                "group": group,
                "name": f"{group}/{'decay' if decays else 'no_decay'}",
            }
            for group in GROUPS
            for decays in (True, False)
            if (parameters := self._trainable(group, decays))
        ]

    def weight_norms(self, gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]]) -> dict[str, float]:
        """Compute `wn/<group>`, the L2 norm of the group's weights, or of its adapters, for each group that has any.

        Args:
            gather: makes parameters that ZeRO-3 has partitioned whole for a `with` block. It is given one parameter
                at a time, or the whole model would be in memory.
        """
        squares: dict[str, list[torch.Tensor]] = defaultdict(list)
        for entry in self.parameters:
            if entry.is_base:  # it never changes, and its norm would hide the adapters'
                continue
            with gather([entry.parameter]):
                squares[entry.group].append(entry.parameter.detach().float().square().sum())
        return {f"wn/{group}": float(torch.stack(sums).sum().sqrt()) for group, sums in squares.items()}

    def _trainable(self, group: str, decays: bool) -> list[nn.Parameter]:
        return [
            entry.parameter
            for entry in self.parameters
            if entry.group == group and entry.decays is decays and entry.parameter.requires_grad
        ]


def current_learning_rates(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Read `lr/<group>` from an optimizer's `param_groups`, as the scheduler has left them."""
    return {f"lr/{group['group']}": float(group["lr"]) for group in param_groups}


def _group_of_parameter(name: str) -> str:
    """Find the group of a parameter by its dotted name, whatever wraps the model; ModelError where none fits."""
    parts = name.split(".")
    if "detection_head" in parts:
        inside = parts[parts.index("detection_head") + 1 :]
        return "adapter" if any("adapter" in part for part in inside) else "detection"
    if "visual" in parts:
        return "merger" if "merger" in parts else "vision"
    if "language_model" in parts or "lm_head" in parts:
        return "llm"
    raise ModelError(f"parameter {name} belongs to none of {', '.join(GROUPS)}; add it to _group_of_parameter")


def _group_learning_rates(config: TrainingConfig, world_size: int) -> dict[str, float]:
    """Read the rate of each group; auto_scale_lr multiplies it by global batch size over lr_reference_batch_size.

    The linear scaling rule of Goyal et al. 2017 (arXiv:1706.02677).
    """
    rates = stated_learning_rates(config)
    if not config.auto_scale_lr:
        return rates
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    factor = batch_size / config.lr_reference_batch_size
    return {group: rate * factor for group, rate in rates.items()}


def _sort_parameters(model: nn.Module) -> tuple[ManagedParameter, ...]:
    """List every parameter once. A tied one has several names: the earliest group of GROUPS owns it."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    decay_free = set(_decay_free_names(model))
    bases = BASE_GROUPS if has_adapters(model) else ()
    return tuple(
        ManagedParameter(
            name=aliases[0],
            parameter=parameter,
            group=(group := min(map(_group_of_parameter, aliases), key=GROUPS.index)),
            decays=decay_free.isdisjoint(aliases),
            is_base=group in bases and not is_adapter_name(aliases[0]),
        )
        for parameter, aliases in names.items()
    )


def _decay_free_names(model: nn.Module) -> Iterator[str]:
    """Name the parameters of norms, and biases.

    Norms are recognised by the module's class: transformers' filter goes by the parameter's name and lets
    Qwen2.5-VL's `norm1`, `norm2` and `ln_q` decay.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_norm or name.endswith("bias"):  # `in_proj_bias` of attention as well
                yield f"{prefix}.{name}" if prefix else name
