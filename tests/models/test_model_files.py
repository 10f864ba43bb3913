"""The small files of a model folder: every fact under the names of both versions, and all that a tokenizer needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.data.chat import ChatBuilder, Turn
from bbu.models.model_files import make_readable, save_image_processor, save_tokenizer, write_config
from bbu.models.qwen import load_image_processor, load_tokenizer
from bbu.models.tiny import SPECIAL_TOKENS, build_tiny_model
from tests.models.folders import copy_folder

REAL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 2048,
    "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 151936, "image_token_id": 151655,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
"""The flat layout of the real model's config.json."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def saved_config(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """config.json as it is saved for a model that was loaded with another config.json."""
    (folder / "config.json").write_text(json.dumps(values))
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    config.save_pretrained(folder)
    write_config(folder, config, "Qwen2_5_VLForConditionalGeneration")
    return json.loads((folder / "config.json").read_text())


def test_the_real_models_config_keeps_its_old_names(tmp_path: Path):
    written = saved_config(tmp_path, REAL_3B)
    text = written["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (1e6, REAL_3B["rope_scaling"])
    assert written["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert written["torch_dtype"] == written["dtype"] == "bfloat16" and text["use_cache"] is True
    kept = ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "max_window_layers")
    assert {key: text[key] for key in kept} == {key: REAL_3B[key] for key in kept}
    assert REAL_3B["vision_config"].items() <= written["vision_config"].items()


@pytest.mark.parametrize("scaling", [
    {"type": "mrope", "mrope_section": [16, 24, 24]},
    {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
     "mrope_section": [16, 24, 24]},
], ids=["plain", "yarn"])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_as_what_was_loaded(tmp_path: Path, scaling: dict, tied: bool):
    values = REAL_3B | {"rope_scaling": scaling, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    written = saved_config(tmp_path, values)
    again = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    assert again.text_config.rope_parameters == loaded.text_config.rope_parameters
    assert again.tie_word_embeddings is again.text_config.tie_word_embeddings is tied
    assert again.vision_config.to_dict() == loaded.vision_config.to_dict()
    assert saved_config(tmp_path, written) == written


def test_training_without_a_cache_is_not_written_down(tmp_path: Path):
    written = saved_config(tmp_path, REAL_3B | {"use_cache": False})
    assert "use_cache" not in written and written["text_config"]["use_cache"] is True


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder whose tokenizer and image processor were loaded and saved again."""
    copy = copy_folder(folder, tmp_path / "saved")
    save_tokenizer(load_tokenizer(folder), copy)
    save_image_processor(load_image_processor(folder), copy, 784, 28224)
    return copy


def test_a_tokenizer_saved_again_writes_the_same_tokens(folder: Path, saved: Path):
    one, other = load_tokenizer(folder), load_tokenizer(saved)
    for text in ("螺丝连接点/BBU安装螺丝 [12, 345]", "<|im_start|>user\n<|image_pad|>é ☃\t\n", ""):
        assert one.encode(text) == other.encode(text)
    assert one.get_vocab() == other.get_vocab() and len(one) == len(other)
    assert set(SPECIAL_TOKENS) <= set(other.all_special_tokens)
    assert (one.eos_token, one.pad_token) == (other.eos_token, other.pad_token)


def test_a_tokenizer_is_saved_with_the_files_of_both_versions(folder: Path, saved: Path):
    names = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"}
    assert names <= {path.name for path in saved.iterdir()}
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert set(config["additional_special_tokens"]) == set(SPECIAL_TOKENS) and "extra_special_tokens" not in config
    added = {token["content"]: int(index) for index, token in config["added_tokens_decoder"].items()}
    assert added == load_tokenizer(folder).get_added_vocab()
    assert not {"is_local", "local_files_only", "name_or_path"} & config.keys()
    for name in names:
        assert (saved / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_chat_template_writes_what_training_writes(saved: Path):
    tokenizer = load_tokenizer(saved)
    turn = Turn("student", (1,), "检测所有部件", None)
    trained = ChatBuilder(tokenizer).build("只输出JSON", [turn]).ids
    content = [{"type": "image"}, {"type": "text", "text": "检测所有部件"}]
    messages = [{"role": "system", "content": "只输出JSON"}, {"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == trained


def test_a_processors_chat_template_is_not_lost(folder: Path, tmp_path: Path):
    copy = copy_folder(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'as Qwen wrote it' }}"}))
    assert load_tokenizer(copy).chat_template == "{{ 'as Qwen wrote it' }}"


def test_the_pixel_limits_are_stated_under_both_names(saved: Path):
    written = json.loads((saved / "preprocessor_config.json").read_text())
    assert (written["min_pixels"], written["max_pixels"]) == (784, 28224)
    assert written["size"] == {"shortest_edge": 784, "longest_edge": 28224}
    processor = Qwen2VLImageProcessorPil.from_pretrained(saved)
    grid = processor(images=[Image.new("RGB", (900, 700))])["image_grid_thw"][0]
    assert grid[1] * grid[2] * 14 * 14 <= 28224


def test_limits_of_a_folder_are_replaced_by_those_of_the_config(saved: Path, tmp_path: Path):
    save_image_processor(load_image_processor(saved), tmp_path, 3136, 100352)
    assert dict(Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size)["longest_edge"] == 100352


def test_all_weights_can_be_read_by_the_group(tmp_path: Path):
    (tmp_path / "detection_head").mkdir()
    for path in (tmp_path / "model.safetensors", tmp_path / "detection_head/model.safetensors"):
        path.touch(mode=0o600)
        make_readable(tmp_path)
        assert os.stat(path).st_mode & 0o777 == 0o644
