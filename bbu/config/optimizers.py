"""The optimizers of transformers that a run config can name, and the Python package that each needs."""

from __future__ import annotations

import importlib.util

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Those that need no package besides those of the extra `train`."""
_PACKAGES = {
    "torch_xla": ("adamw_torch_xla",),
    "torch_npu": ("adamw_torch_npu_fused",),
    "torchdistx": ("adamw_anyprecision",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "bitsandbytes": (
        "ademamix", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
        "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    ),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
    "optimi": ("stable_adamw",),
}  # fmt: skip
"""Package -> its optimizers, as transformers' `trainer_optimizer` imports them; a site installs the package itself.
GaLore, APOLLO and LOMO are no choice: they need the names of modules, or the model, for which there is no key."""


def optimizer_package(name: str) -> str | None:
    """The package that an optimizer needs besides those of the extra `train`; None for any other name."""
    return next((package for package, names in _PACKAGES.items() if name in names), None)


def missing_optimizer_package(name: str) -> str | None:
    """The package that an optimizer needs and that this Python lacks; None where nothing is missing."""
    package = optimizer_package(name)
    return package if package and importlib.util.find_spec(package) is None else None
