"""A tiny Qwen2.5-VL with random weights, saved as an ordinary model folder.

Same architecture, special tokens and files as the real one, so that nothing downstream knows it is tiny:
for laptops, tests and the first command of the README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.errors import run_entry
from bbu.models.model_files import CHAT_TEMPLATE, make_readable, save_image_processor, save_tokenizer, write_config

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's special tokens, in the order of their ids."""

VOCAB_SIZE = 1024
"""Upper bound of the trained BPE; the corpus may yield fewer tokens."""

CORPUS = (
    "你是通信机房的设备质检员，负责检查BBU机柜的照片。请找出照片中每一个需要检查的部件，给出位置和描述。",
    "回答是一个JSON列表，坐标是绝对像素，用整数；没有部件时回答[]。只输出JSON，不加任何解释。按要求的格式。",
    "检测所有部件：类型/属性/补充说明，先上后下、先左后右，同类部件逐个列出，看不清的不要猜。",
    "You inspect photos of BBU cabinets in telecom equipment rooms. Detect all parts in the photo.",
    "Answer with one JSON list in absolute integer pixels, without any explanation, [] if there is no part.",
    "system user assistant type/property/extra top to bottom and left to right",
    *(f'[{{"bbox_2d": [1, 2, 3, 4], "desc": "{label}"}}, {{"bbox_2d": [5, 6, 7, 8]' for label in (
        "螺丝连接点/BBU安装螺丝/安装正确", "螺丝连接点/BBU安装螺丝/连接错误",
        "螺丝连接点/CPRI光缆和BBU连接点/连接正确",
        "螺丝连接点/地排处螺丝/安装正确", "螺丝连接点/BBU尾纤和ODF连接点/安装错误",
        "螺丝连接点/BBU接地线机柜接地端/安装正确",
        "bbu基带处理单元/华为", "bbu基带处理单元/中兴", "bbu基带处理单元/爱立信", "挡风板/未安装", "挡风板/已安装",
        "机柜空间/满载", "机柜空间/非满载", "标签贴纸", "线缆/光纤", "线缆/非光纤",
        "screw_connection_point/install_screw/correct", "connection_point/install_screw/install_screw_true",
        "bbu/huawei", "bbu/zte", "bbu/ericsson", "shield/installed", "cabinet/full", "label", "cable/fiber",
    )),
)  # fmt: skip
"""What the BPE is trained on: the words of this project's answers and prompts. Other text falls back to bytes."""


def build_tiny_model(folder: str | Path, seed: int, corpus: Iterable[str] = CORPUS) -> Path:
    """Write a Qwen2.5-VL of about 2.5 M parameters to `folder`; same seed and corpus, same weights."""
    path = Path(folder)
    tokenizer = build_tokenizer(corpus)
    config = _config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    eos, pad = _id(tokenizer, "<|im_end|>"), _id(tokenizer, "<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad, do_sample=False)
    model.save_pretrained(path)
    write_config(path, config, type(model).__name__)
    save_tokenizer(tokenizer, path)
    save_image_processor(Qwen2VLImageProcessorPil(), path)
    make_readable(path)
    return path


def build_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's pre-tokenisation (each digit its own token) trained on `corpus`."""
    trained = Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str())
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(list(corpus), trainer)
    bpe = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab={token: i for token, i in bpe["vocab"].items() if token not in SPECIAL_TOKENS},
        merges=[tuple(pair) for pair in bpe["merges"]],  # pyright: ignore[reportArgumentType]  annotation says str
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        chat_template=CHAT_TEMPLATE,
    )


def _id(tokenizer: Qwen2Tokenizer, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def _config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    ids = {token: _id(tokenizer, token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config=_text_config(len(tokenizer), ids),
        vision_config=_vision_config(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _text_config(vocab_size: int, ids: dict[str, int]) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        # Real Qwen2.5-VL-3B: sections 16/24/24 of a head of 128; the same shares of a head of 32.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _vision_config() -> dict:
    return {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "out_hidden_size": 192,
        "fullatt_block_indexes": [1, 3],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Build the tiny model: `python -m bbu.models.tiny --out DIR --seed N`."""
    arguments = _parser().parse_args(argv)
    build_tiny_model(arguments.out, arguments.seed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.models.tiny", description="Build a tiny random Qwen2.5-VL.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same weights (0)")
    return parser


if __name__ == "__main__":
    run_entry(main)
