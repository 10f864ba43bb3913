"""Any Qwen2.5-VL folder, read offline: weights, tokenizer, image processor."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.config.domains import ModelConfig
from bbu.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
_ARCHITECTURE = Qwen2_5_VLForConditionalGeneration.__name__

StatesReader = Callable[[torch.Tensor, torch.nn.Module], Any]
"""Takes the last states [B, S, H] and the language head [*, H] -> [*, V]."""


class BBUModel(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose last states can be read inside its own forward pass, and so under any wrapper.

    DDP, ZeRO and autocast act on `forward`; a loss that needs logits at a tenth of the positions must therefore
    be computed in it, or the logits of all of them come out.
    """

    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)  # generate() looks for arguments by name
    def forward(self, *args: Any, read_states: StatesReader | None = None, **kwargs: Any) -> Any:
        """As Qwen2.5-VL's; with `read_states` the result is what that returns, and no logits are made here."""
        if read_states is None:
            return super().forward(*args, **kwargs)
        return read_states(self.model(*args, **kwargs)[0], self.lm_head)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, but the folder names the stock architecture, so that other tools can serve it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if kwargs.get("is_main_process", True):
            described = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [_ARCHITECTURE]}
            path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(folder: str | Path, config: ModelConfig, *, for_training: bool = True) -> BBUModel:
    """Load the weights in `config.torch_dtype` with the configured attention of both towers.

    Raises ModelError for a missing folder, a foreign architecture, or weights that leave parameters unset.
    """
    path = check_folder(folder)
    _register_layout()
    try:
        loaded: Any = BBUModel.from_pretrained(
            path,
            dtype=_DTYPES[config.torch_dtype],
            attn_implementation={
                "text_config": config.attn_implementation,
                "vision_config": config.vision_attn_implementation,
            },
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot load the model ({_first_line(error)}); check the folder") from error
    model, report = loaded  # a pair because of output_loading_info
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{path}: weights are incomplete, for example {names}; copy the model again")
    return _prepare_for_training(model, config) if for_training else model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; raises ModelError where it cannot be read."""
    path = check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the tokenizer ({_first_line(error)}); check the folder") from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """What batches are padded with; ModelError where the tokenizer names none."""
    if not isinstance(tokenizer.pad_token_id, int):
        raise ModelError(f"{folder}: the tokenizer has no pad token; copy the tokenizer files of Qwen2.5-VL again")
    return tokenizer.pad_token_id


def load_image_processor(folder: str | Path) -> Qwen2VLImageProcessorPil:
    """The folder's image processor on Pillow: the stock one needs torchvision, which has no CPU build here."""
    path = check_folder(folder)
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the image processor ({_first_line(error)})") from error


def check_folder(folder: str | Path) -> Path:
    """The folder, if it holds a Qwen2.5-VL; else ModelError in one line."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder; correct model_path or copy the model there")
    absent = [name for name in _NEEDED if not (path / name).is_file()]
    if absent:
        raise ModelError(f"{path}: no {', '.join(absent)}; model_path must be a complete Qwen2.5-VL folder")
    try:
        Qwen2_5_VLConfig.from_pretrained(path, local_files_only=True)
        kind = Qwen2_5_VLConfig.get_config_dict(path, local_files_only=True)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: config.json cannot be read ({_first_line(error)})") from error
    if kind != "qwen2_5_vl":
        raise ModelError(f"{path}: model_type is {kind!r}; model_path must be a Qwen2.5-VL (qwen2_5_vl)")
    return path


def _register_layout() -> None:
    """Weights on disk are named otherwise than in memory; transformers looks the names up by class name."""
    stock: Any = get_checkpoint_conversion_mapping(_ARCHITECTURE)
    register_checkpoint_conversion_mapping(BBUModel.__name__, stock, overwrite=True)


def _prepare_for_training(model: BBUModel, config: ModelConfig) -> BBUModel:
    # Both: Trainer only sets the outer one, the text model reads its own; a live cache makes packed samples
    # leak into each other under sdpa.
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": config.gradient_checkpointing_reentrant})
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
