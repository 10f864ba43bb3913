"""The small files of a model folder, written so that transformers 4.57 reads them as 5.23 does.

Version 5 renamed keys without writing the old names beside the new ones: rotary embeddings, tied embeddings, special
tokens, pixel limits. Where a key is missing, 4.57 takes a default in silence (an untied, random language head; other
pixel limits) or fails. So each such fact is stated under both names. What is read is the same in both versions, and
`tests/models/test_other_versions.py` compares logits and generated tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.errors import ModelError
from bbu.run.folder import HEAD_KEY
from bbu.strict_json import read_json

_PROCESSOR = "Qwen2_5_VLProcessor"
"""The processor class of Qwen2.5-VL, which AutoProcessor looks up in the configs of its parts."""
_OF_THIS_MACHINE = ("is_local", "local_files_only")
"""How version 5 loaded the tokenizer, which it writes down as if it belonged to the tokenizer."""
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Qwen2.5-VL's chat format as `bbu.data.chat` writes it, for folders whose tokenizer states no template. Unlike Qwen's
own template it invents no system prompt where there is none."""


def write_config(folder: Path, config: Qwen2_5_VLConfig, architecture: str) -> None:
    """Rewrite the config.json that transformers has saved in a folder, for other versions and other tools.

    Args:
        folder: the model folder.
        config: the config that was saved.
        architecture: the model class that other tools shall load.
    """
    path = folder / "config.json"
    written = _read(path) | {"architectures": [architecture], "tie_word_embeddings": bool(config.tie_word_embeddings)}
    for key in (HEAD_KEY, "use_cache"):  # the head has a config of its own; training alone does without a cache
        written.pop(key, None)
    written["torch_dtype"] = written["dtype"]
    written["text_config"] |= _text_config_of_version_4(written)
    _write(path, written)


def _text_config_of_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """What 4.57 looks for in text_config: the ties, and rotary embeddings under their old names."""
    rope = dict(config["text_config"]["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    # Both versions call multimodal rotary embeddings without scaling `mrope` in files, and `default` in memory.
    scaling = rope | {"type": "mrope"} if kind == "default" else rope | {"type": kind, "rope_type": kind}
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "use_cache": True,
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all files of a tokenizer, those that only the slow tokenizer of 4.57 reads included."""
    tokenizer.save_pretrained(folder)
    backend: Any = tokenizer.backend_tokenizer
    backend.model.save(str(folder))  # vocab.json and merges.txt
    path = folder / "tokenizer_config.json"
    written = {key: value for key, value in _read(path).items() if key not in _OF_THIS_MACHINE}
    # The new name of this list is that of a dict in 4.57, which fails on a list. Version 5 reads the old name too.
    if special := written.pop("extra_special_tokens", None):
        written["additional_special_tokens"] = special
    written["added_tokens_decoder"] = {
        str(index): token.__getstate__() for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    written["add_prefix_space"] = bool(written.get("add_prefix_space"))
    _write(path, written | {"processor_class": _PROCESSOR})


def load_chat_template(folder: Path) -> str:
    """The chat template of a folder whose tokenizer states none: that of its processor, else Qwen2.5-VL's format."""
    path = folder / "chat_template.json"  # where processors kept it before version 5, which does not look there
    template = read_json(path, ModelError, "copy the model again").get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else CHAT_TEMPLATE


def save_image_processor(
    processor: Qwen2VLImageProcessorPil, folder: Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> None:
    """Write an image processor with its pixel limits: `size` for version 5, min_pixels and max_pixels for 4.57.

    Args:
        processor: the image processor.
        folder: the model folder.
        min_pixels, max_pixels: limits of width times height after the resize; None takes the processor's.
    """
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    written = _read(path)
    least = written["size"]["shortest_edge"] if min_pixels is None else min_pixels
    most = written["size"]["longest_edge"] if max_pixels is None else max_pixels
    limits = {"min_pixels": least, "max_pixels": most, "size": {"shortest_edge": least, "longest_edge": most}}
    _write(path, written | limits | {"processor_class": _PROCESSOR})


def make_readable(folder: Path) -> None:
    """Let everyone read the weights; safetensors' own mode 0600 would hide them from the group."""
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
