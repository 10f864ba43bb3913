"""Loading a model folder: what is configured, what a folder must hold, and messages of one line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bbu.errors import ConfigError, ModelError
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer
from bbu.models.tiny import build_tiny_model
from bbu.resize import MERGE_SIZE, PATCH_SIZE


def settings(**changes):
    stated = {
        "torch_dtype": "float32", "attn_implementation": "eager", "vision_attn_implementation": "sdpa",
        "gradient_checkpointing": False,
    }  # fmt: skip
    return SimpleNamespace(**{**stated, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


def test_the_image_processor_cuts_as_smart_resize_counts(folder):
    processor = load_image_processor(folder)
    assert (processor.patch_size, processor.merge_size) == (PATCH_SIZE, MERGE_SIZE)


def test_attention_and_dtype_are_the_configured_ones(folder):
    model = load_model(folder, settings(torch_dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("key", ["attn_implementation", "vision_attn_implementation"])
def test_flash_attention_on_a_machine_without_it_names_the_key_to_change(folder, key):
    with pytest.raises(ConfigError, match=rf"^{key} flash_attention_2: .*\(--set {key}=sdpa\)$"):
        load_model(folder, settings(**{key: "flash_attention_2"}))


def test_training_switches_the_text_models_cache_off(folder):
    assert load_model(folder, settings()).config.text_config.use_cache is False
    assert load_model(folder, settings(), for_training=False).config.text_config.use_cache is True


def test_gradient_checkpointing_follows_the_config(folder):
    assert load_model(folder, settings(gradient_checkpointing=True)).is_activation_checkpointing
    assert not load_model(folder, settings()).is_activation_checkpointing


def is_one_line(error):
    return "\n" not in str(error.value)


def test_a_missing_folder_is_one_line(tmp_path):
    for load in (load_tokenizer, load_image_processor, lambda p: load_model(p, settings())):
        with pytest.raises(ModelError, match="no such model folder") as error:
            load(tmp_path / "absent")
        assert is_one_line(error)


def test_an_incomplete_folder_names_what_is_absent(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no tokenizer_config.json, preprocessor_config.json") as error:
        load_model(tmp_path, settings())
    assert is_one_line(error)


def copy_model(folder, target, skip=()):
    for file in folder.iterdir():
        if file.name not in skip:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_missing_or_broken_weights_are_one_line(folder, tmp_path):
    path = copy_model(folder, tmp_path, skip=("model.safetensors",))
    with pytest.raises(ModelError, match="cannot load the model") as error:
        load_model(path, settings())
    assert is_one_line(error)
    weights = (folder / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot load the model") as error:
        load_model(path, settings())
    assert is_one_line(error)


def test_weights_that_leave_parameters_unset_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy_model(folder, tmp_path)
    weights = load_file(path / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp.down_proj.weight" in name))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete, for example .*down_proj"):
        load_model(path, settings())


@pytest.mark.parametrize("name", ["config", "generation_config", "preprocessor_config", "tokenizer_config"])
@pytest.mark.parametrize("content", ["{", "[]", "", "\x00"])
def test_a_damaged_json_file_is_named_and_never_replaced_by_defaults(folder, tmp_path, name, content):
    path = copy_model(folder, tmp_path)
    (path / f"{name}.json").write_text(content)
    with pytest.raises(ModelError, match=rf"/{name}\.json: not (a )?JSON") as error:
        load_model(path, settings())
    assert is_one_line(error)


@pytest.mark.parametrize("change", [{"tie_word_embeddings": "yes"}, {"image_token_id": "<|image_pad|>"}])
def test_a_config_that_describes_no_model_is_one_line(folder, tmp_path, change):
    path = copy_model(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=r"config\.json does not describe a Qwen2\.5-VL") as error:
        load_model(path, settings())
    assert is_one_line(error)


def test_sampling_settings_are_kept_when_the_model_is_saved_again(folder, tmp_path):
    path = copy_model(folder, tmp_path)
    qwen = {"bos_token_id": 890, "pad_token_id": 890, "do_sample": True, "eos_token_id": [889, 890],
            "repetition_penalty": 1.05, "temperature": 1e-06}  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(qwen))
    load_model(path, settings()).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert saved.pop("transformers_version") and saved == qwen


def test_another_architecture_is_refused(folder, tmp_path):
    path = copy_model(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ModelError, match="model_type is 'llama'") as error:
        load_model(path, settings())
    assert is_one_line(error)
