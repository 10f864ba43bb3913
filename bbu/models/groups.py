"""The five groups of parameters that have a learning rate of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bbu.config.domains import TrainingConfig

BASE_GROUPS = ("vision", "merger", "llm")
"""The groups that make up the base model; with lora_rank they get low-rank adapters."""
HEAD_GROUPS = ("detection", "adapter")
"""The groups that make up the detection head."""
GROUPS = (*BASE_GROUPS, *HEAD_GROUPS)
"""All groups; the earliest one owns a parameter that several share."""
_RATES: Mapping[str, Callable[[TrainingConfig], float]] = {
    "vision": lambda config: config.vision_lr,
    "merger": lambda config: config.merger_lr,
    "llm": lambda config: config.llm_lr,
    "detection": lambda config: config.detection_lr,
    "adapter": lambda config: config.adapter_lr,
}


def stated_learning_rates(config: TrainingConfig) -> dict[str, float]:
    """Read the learning rate that a config states for each group."""
    return {group: float(_RATES[group](config)) for group in GROUPS}
