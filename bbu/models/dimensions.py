"""The dimensions of a Qwen2.5-VL and of its detection head, read without torch, and how many parameters they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import DetectionConfig
from bbu.errors import ModelError
from bbu.run.folder import ADAPTER_CONFIG, is_adapter_folder
from bbu.strict_json import read_json

_TEXT_DEFAULTS = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
_VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584, "in_channels": 3,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
"""What transformers takes for keys that a config.json leaves out."""


@dataclass(frozen=True)
class ModelDimensions:
    """The numbers of a model's config.json that decide its size."""

    vocab: int
    """Tokens in the vocabulary."""
    width: int
    """Width of the language model."""
    inner: int
    """Width of its feed-forward blocks."""
    layers: int
    """Its layers."""
    key_value_width: int
    """Width of the keys, and of the values, of a layer."""
    tied: bool
    """Whether the language head shares the weights of the token embedding."""
    vision_width: int
    """Width of the vision tower."""
    vision_inner: int
    """Width of its feed-forward blocks."""
    vision_layers: int
    """Its layers."""
    vision_out: int
    """Width of what the merger hands to the language model."""
    patch_values: int
    """Inputs of the patch embedding."""
    merged_patches: int
    """Patches that the merger joins to one token."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelDimensions:
        """Read a config.json, of the hub's older form (the language model's keys on top) or of transformers 5."""
        nested = config.get("text_config")
        text = _TEXT_DEFAULTS | _numbers(nested if isinstance(nested, dict) else config, _TEXT_DEFAULTS)
        vision_config = config.get("vision_config")
        vision = _VISION_DEFAULTS | _numbers(vision_config if isinstance(vision_config, dict) else {}, _VISION_DEFAULTS)
        head = text["hidden_size"] // text["num_attention_heads"]
        return cls(
            vocab=text["vocab_size"],
            width=text["hidden_size"],
            inner=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            key_value_width=head * text["num_key_value_heads"],
            tied=bool(config.get("tie_word_embeddings", False)),
            vision_width=vision["hidden_size"],
            vision_inner=vision["intermediate_size"],
            vision_layers=vision["depth"],
            vision_out=vision["out_hidden_size"],
            patch_values=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            merged_patches=vision["spatial_merge_size"] ** 2,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer of the language model."""
        attention = 2 * self.width * (self.width + self.key_value_width) + self.width + 2 * self.key_value_width
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, and of the language head where it has its own."""
        return self.vocab * self.width

    @property
    def vision_layer_parameters(self) -> int:
        """Parameters of one layer of the vision tower."""
        width, inner = self.vision_width, self.vision_inner
        return 4 * width * width + 4 * width + 3 * width * inner + 2 * inner + width + 2 * width


def read_dimensions(folder: str | Path) -> ModelDimensions | None:
    """Read the dimensions of a model folder, or of the base model that a folder of adapters names.

    Returns:
        The dimensions; None where there is no config.json.

    Raises:
        ModelError: a file is not JSON.
    """
    path = Path(folder) / "config.json"
    if is_adapter_folder(Path(folder)):
        adapters = read_json(Path(folder) / ADAPTER_CONFIG, ModelError, "copy the folder again")
        path = Path(str(adapters.get("base_model_name_or_path"))) / "config.json"
    if not path.is_file():
        return None
    return ModelDimensions.from_config(read_json(path, ModelError, "copy the model again"))


def count_parameters(dimensions: ModelDimensions, detection: DetectionConfig) -> dict[str, int]:
    """Count the parameters of each learning-rate group of `ParameterManager`."""
    d = dimensions
    joined = d.vision_width * d.merged_patches
    counts = {
        "vision": d.patch_values * d.vision_width + d.vision_layers * d.vision_layer_parameters,
        "merger": d.vision_width + _linear(joined, joined) + _linear(joined, d.vision_out),
        "llm": d.embedding_parameters * (1 if d.tied else 2) + d.layers * d.layer_parameters + d.width,
        "detection": 0,
        "adapter": 0,
    }
    return counts | (_count_head(d, detection) if detection.detection_enabled else {})


def count_low_rank(dimensions: ModelDimensions, rank: int) -> dict[str, int]:
    """Count the parameters of low-rank adapters on every linear layer, by learning-rate group (see `adapters.py`)."""
    d = dimensions
    joined = d.vision_width * d.merged_patches
    # the widths before and after each layer: queries, keys, values, out
    attention = 6 * d.width + 2 * d.key_value_width
    return {
        "vision": rank * d.vision_layers * (6 * d.vision_width + 3 * (d.vision_width + d.vision_inner)),
        "merger": rank * (3 * joined + d.vision_out),
        "llm": rank * d.layers * (attention + 3 * (d.width + d.inner)),
    }


def _count_head(d: ModelDimensions, config: DetectionConfig) -> dict[str, int]:
    """Count the parameters of the detection head, module by module as `DetectionHead` builds them."""
    width, ffn, heads = config.detection_hidden_dim, config.detection_ffn_dim, config.detection_num_heads
    square, norm, feed_forward = _linear(width, width), 2 * width, _linear(width, ffn) + _linear(ffn, width)
    box, score = _mlp(width, width, 4), _linear(width, 1)
    inputs = [d.vision_width, *([d.width] if config.detection_use_language_memory else [])]
    hidden = config.detection_adapter_dim
    adapters = sum(2 * size + _linear(size, hidden) + _linear(hidden, width) + norm for size in inputs)
    layer = 3 * norm + 2 * _linear(width, 2 * width) + 4 * square + 2 * _mlp(2, 32, heads) + feed_forward
    caption_layer = 2 * norm + _linear(width, 3 * width) + square + feed_forward
    captions = config.detection_caption_layers * caption_layer + norm + _linear(width, d.width)
    captions += config.detection_caption_max_length * width
    proposals = _mlp(2 * width, width, width) + box + score + square + width
    return {
        "adapter": adapters + _linear(d.width, width),
        "detection": proposals + config.detection_num_layers * (layer + box + score) + norm + captions,
    }


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp(inputs: int, hidden: int, outputs: int) -> int:
    return _linear(inputs, hidden) + _linear(hidden, outputs)


def _numbers(values: Mapping[str, Any], names: Mapping[str, int]) -> dict[str, int]:
    return {name: values[name] for name in names if isinstance(values.get(name), int)}
