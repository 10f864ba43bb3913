"""A model folder as Qwen2.5-VL-3B-Instruct lies on the hub, with few layers and random weights.

The files and their keys are those that Qwen wrote with transformers 4.41: flat keys in config.json, old names of
weights, two shards, sampling in generation_config.json, pixel limits by their old names, a template of its own. Heads
have the true widths (128 and 80) and rotary sections. Heads and vocabulary are fewer: two layers of each tower at the
true widths have 543 million weights, of which 311 in the embedding; a step took 11 CPU-seconds for 325 tokens, training
would hold 9 GB, and each checkpoint 6.5 GB.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from bbu.models.model_files import CHAT_TEMPLATE, make_readable
from bbu.models.tiny import CORPUS, SPECIAL_TOKENS, build_tokenizer

WIDTH, VISION_WIDTH = 4 * 128, 4 * 80
TOOL_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Added tokens of the real tokenizer that are not special."""
_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))
"""Beginnings of the names of weights: in memory, and on the hub."""


def build_hub_folder(folder: Path, seed: int = 0) -> Path:
    """Write the folder; a seed gives the same weights each time."""
    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(CORPUS)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}  # pyright: ignore
    config = _config(ids, len(tokenizer) + len(TOOL_TOKENS))
    _write_json(folder / "config.json", config)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder)).bfloat16()
    _write_shards(folder, {hub_name(name): value.contiguous() for name, value in model.state_dict().items()})
    _write_tokenizer(folder, tokenizer, ids)
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    sampling = {"do_sample": True, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
                "repetition_penalty": 1.05, "temperature": 1e-06, "transformers_version": "4.49.0"}  # fmt: skip
    _write_json(folder / "generation_config.json", ends | sampling)
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    make_readable(folder)
    return folder


def hub_name(name: str) -> str:
    """The name of a weight on the hub, of its name in memory."""
    for here, there in _PREFIXES:
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


def _config(ids: dict[str, int], vocabulary: int) -> dict[str, Any]:
    """The keys of Qwen's config.json in their order, all of the text model's at the top level."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": _VISION,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        # The real embedding has more rows than there are tokens, too: 151,936 for 151,665.
        "vocab_size": -(-vocabulary // 128) * 128,
    }


_VISION = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 428,
    "num_heads": 4,
    "in_chans": 3,
    "out_hidden_size": WIDTH,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def _write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the vision tower and the embedding into one shard, the layers into the other, and the index of both.

    The language head is tied to the embedding, and is in no file.
    """
    weights.pop("lm_head.weight")
    shards: dict[str, dict[str, torch.Tensor]] = {f"model-0000{n}-of-00002.safetensors": {} for n in (1, 2)}
    first, second = shards
    for name, value in weights.items():
        shards[second if name.startswith(("model.layers.", "model.norm.")) else first][name] = value
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(value.numel() * value.element_size() for value in weights.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )  # fmt: skip


def _write_tokenizer(folder: Path, tokenizer: Qwen2Tokenizer, ids: dict[str, int]) -> None:
    """Write the files of the slow and of the fast tokenizer, and the template in both places."""
    tokenizer.add_tokens(list(TOOL_TOKENS))
    backend: Any = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json and merges.txt
    added = {
        str(index): {"content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
                     "single_word": False, "special": token.content in ids}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }  # fmt: skip
    special = [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"]
    written = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": special, "bos_token": None, "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", written)
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
