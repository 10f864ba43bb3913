"""The tiny model: an ordinary Qwen2.5-VL folder, the same bytes for the same seed, and the command that builds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.models.qwen import load_tokenizer
from bbu.models.tiny import SPECIAL_TOKENS, build_tiny_model, main
from tests.models.stand_ins import load_bbu_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


def test_it_is_a_qwen25_vl_of_about_two_and_a_half_million_parameters(folder):
    model = load_bbu_model(folder)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert 2.0e6 < model.num_parameters() < 3.0e6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(folder, tmp_path):
    repeated, other = build_tiny_model(tmp_path / "a", seed=0), build_tiny_model(tmp_path / "b", seed=1)
    for file in folder.iterdir():
        assert (repeated / file.name).read_bytes() == file.read_bytes(), file.name
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_building_leaves_the_callers_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    build_tiny_model(tmp_path, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_special_tokens_are_single_and_agree_with_the_config(folder):
    tokenizer = load_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    assert all(len(tokenizer.encode(t, add_special_tokens=False)) == 1 for t in SPECIAL_TOKENS)
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert config["text_config"]["vocab_size"] == len(tokenizer)


def test_every_digit_is_its_own_token_and_any_text_survives(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("[1280, 7]").count("1") == 1
    assert [t for t in tokenizer.tokenize("90125") if t.isdigit()] == list("90125")
    for text in ('[{"bbox_2d": [12, 345, 6, 7], "desc": "螺丝连接点/安装正确"}]', "其它文字 ☃ é\t\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_command_builds_the_model_of_its_seed(tmp_path: Path):
    assert main(["--out", str(tmp_path / "command"), "--seed", "7"]) == 0
    build_tiny_model(tmp_path / "function", seed=7)
    for path in (tmp_path / "function").iterdir():
        assert (tmp_path / "command" / path.name).read_bytes() == path.read_bytes()
