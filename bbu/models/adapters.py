"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on the linear layers of Qwen2.5-VL, by the library peft.

The adapters are injected into the model, so that its class, its forward pass and the names of its parts stay. A folder
of adapters has peft's own layout: `peft.PeftModel.from_pretrained(stock model, folder)` loads it. It names its base
model, and holds a fingerprint of that model's weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from bbu.config.domains import TrainingConfig
from bbu.errors import ModelError
from bbu.models.groups import BASE_GROUPS, stated_learning_rates
from bbu.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter_folder
from bbu.strict_json import read_json

if TYPE_CHECKING:  # peft takes a second to import, which only adapters need
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

_LAYERS = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
    "merger": r"model\.visual\.merger\.mlp\.[02]",
    "llm": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
"""Group of learning rates -> the names of its linear layers, as a regular expression."""
_NAME = "default"
"""peft's name of the only adapter."""
_PREFIX = "base_model.model."
"""What the names of all weights begin with in a file of peft."""
_MARK = ".lora_"
_FINGERPRINT = "base_fingerprint"
"""Key in the metadata of the adapters' file."""
_SAMPLES = 64
"""Values of each weight in a fingerprint: 50,000 of a 3B model, of which any training changes many."""


@dataclass(frozen=True)
class AdapterSpec:
    """Which adapters a run trains."""

    rank: int
    alpha: int
    """Their output is scaled by alpha over rank."""
    dropout: float
    groups: tuple[str, ...]
    """The groups of learning rates whose layers get adapters."""

    @classmethod
    def from_config(cls, config: TrainingConfig) -> AdapterSpec | None:
        """The adapters that a run config asks for; None where it trains the weights themselves."""
        if config.lora_rank == 0:
            return None
        rates = stated_learning_rates(config)
        groups = tuple(group for group in BASE_GROUPS if rates[group] > 0)
        return cls(config.lora_rank, config.lora_alpha, config.lora_dropout, groups)

    @property
    def layers(self) -> str:
        """Regular expression of the names of the layers."""
        return "|".join(_LAYERS[group] for group in self.groups)

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha}, on {' + '.join(self.groups)}"


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters beside its weights."""
    return hasattr(model, "peft_config")


def is_adapter_name(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its dotted name."""
    return _MARK in name


def find_base(folder: Path, model_path: str) -> Path:
    """Find the base model of a folder of adapters: where it was during the training, else at `model_path`.

    Raises:
        ModelError: it is at neither.
    """
    recorded = Path(str(_read_config(folder).get("base_model_name_or_path")))
    for path in (recorded, Path(model_path)):
        if path.is_dir() and not is_adapter_folder(path):
            return path
    raise ModelError(
        f"{folder}: holds adapters of the model {recorded}, which is not there; put it back, or name its new place "
        "with --set model_path=DIR"
    )


def add_adapters(model: nn.Module, spec: AdapterSpec, base: Path) -> None:
    """Inject new adapters, which change nothing yet, into a model of the folder `base`. Draws random numbers."""
    from peft import LoraConfig

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.layers,
        base_model_name_or_path=str(base.absolute()),
    )
    _inject(model, config)


def load_adapters(model: nn.Module, folder: Path, spec: AdapterSpec | None) -> None:
    """Inject the adapters of a folder into their base model.

    Args:
        model: the base model.
        folder: the folder of the adapters.
        spec: the adapters that the run config asks for; None takes them as they are.

    Raises:
        ModelError: the files are damaged, or belong to another base model or to other adapters than `spec`.
    """
    from peft import LoraConfig

    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            fingerprint = (file.metadata() or {}).get(_FINGERPRINT)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: cannot load the adapters ({reason}); copy the folder again") from error
    _check_spec(config, spec, folder)
    _inject(model, config if spec is None else dataclasses.replace(config, lora_dropout=spec.dropout))
    _check_base(model, fingerprint, folder)
    _fill(model, weights, folder)


def save_adapters(model: nn.Module, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapters as peft does, and the fingerprint of their base model.

    Args:
        model: the model with adapters.
        folder: an existing folder.
        weights: all weights by name, where they had to be gathered; None takes the model's.
    """
    config = _lora_config(model)
    weights = model.state_dict() if weights is None else weights
    copies = {
        _name_on_disk(name): tensor.detach().cpu().clone().contiguous()
        for name, tensor in weights.items()
        if is_adapter_name(name)
    }
    # One entry, because safetensors writes several in random order, and the same adapters shall give the same bytes.
    save_file(copies, folder / ADAPTER_WEIGHTS, metadata={_FINGERPRINT: str(model.base_fingerprint)})
    dataclasses.replace(config, inference_mode=True).save_pretrained(str(folder))


def round_adapters(model: Any) -> None:
    """Cast the adapters to the model's dtype, as autocast does in training: for a model that runs without autocast."""
    _cast_adapters(model, model.dtype)


def merge_adapters(model: nn.Module) -> float:
    """Add the adapters to the weights, in float32, and take them out of the model.

    Returns:
        What rounding to the weights' dtype does to the change: norm of the error over norm of the change. bfloat16
        keeps 8 bits of a weight and loses the change of a weight that is below 0.2 % of it.
    """
    error = change = 0.0
    for name, layer in list(_adapted_layers(model)):
        base: Any = layer.get_base_layer()
        delta = layer.get_delta_weight(_NAME).float()
        before = base.weight.data.float()
        base.weight.data = (before + delta).to(base.weight.dtype)
        error += float((base.weight.data.float() - before - delta).square().sum(dtype=torch.float64))
        change += float(delta.square().sum(dtype=torch.float64))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    del model.peft_config
    return (error / change) ** 0.5 if change else 0.0


def _inject(model: Any, config: LoraConfig) -> None:
    """Put adapters in float32 beside the layers that the config names, and freeze everything else."""
    from peft import inject_adapter_in_model

    model.base_fingerprint = _compute_fingerprint(model)
    inject_adapter_in_model(config, model, _NAME)
    _cast_adapters(model, torch.float32)
    for _, layer in _adapted_layers(model):
        # Autocast casts the input of float32 adapters where needed. peft would make a float32 copy for each layer.
        layer.cast_input_dtype_enabled = False
    model.register_load_state_dict_post_hook(_forgive_missing_base)


def _cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter_name(name):
            parameter.data = parameter.data.to(dtype)


def _forgive_missing_base(model: nn.Module, keys: Any) -> None:
    """Let a strict load accept weights without the base model's: DeepSpeed's checkpoints leave out what is frozen."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    from peft.tuners.lora import Linear as LoraLinear

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def _lora_config(model: nn.Module) -> LoraConfig:
    configs: Any = model.peft_config
    return configs[_NAME]


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG, ModelError, "copy the folder again")


def _check_spec(config: LoraConfig, spec: AdapterSpec | None, folder: Path) -> None:
    if spec is None or (config.r, config.lora_alpha, config.target_modules) == (spec.rank, spec.alpha, spec.layers):
        return
    raise ModelError(
        f"{folder}: its adapters have rank {config.r} and alpha {config.lora_alpha}, or are on other layers than the "
        f"run config asks for ({spec}); set lora_rank, lora_alpha and the rates that are 0 as they were, or merge the "
        f"adapters (python -m bbu.export --checkpoint {folder} --merge OUT) and set model_path to OUT"
    )


def _check_base(model: Any, fingerprint: str | None, folder: Path) -> None:
    """Refuse another base model. Adapters from elsewhere have no fingerprint, and float16 rounds otherwise."""
    if fingerprint in (None, model.base_fingerprint) or model.dtype == torch.float16:
        return
    raise ModelError(
        f"{folder}: its adapters belong to other weights than those of {model.name_or_path}; put the base model of "
        "their training there, or move that folder away and name the right one with --set model_path=DIR"
    )


def _compute_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape and some values of each weight of a base model, whatever files and dtype it came from.

    Values are compared as bfloat16, in which they may be loaded. The detection head is not the base model's.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if not name.startswith("detection_head."):
            flat = parameter.detach().flatten()
            values = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fill(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Load the adapters' weights; ModelError where they do not fit the layers of the adapters' config."""
    targets = {_name_on_disk(name): p for name, p in model.named_parameters() if is_adapter_name(name)}
    wrong = [
        name
        for name in sorted(targets.keys() | weights.keys())
        if name not in targets or name not in weights or targets[name].shape != weights[name].shape
    ]
    if wrong:
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: {len(wrong)} weights are missing, unknown or of another shape, for example "
            f"{wrong[0]}; copy the folder again"
        )
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])


def _name_on_disk(name: str) -> str:
    """peft's files leave out the name of the adapter."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")
