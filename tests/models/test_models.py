import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.errors import ModelError
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer
from bbu.models.tiny import SPECIAL_TOKENS, build_tiny_model
from bbu.resize import MERGE_SIZE, PATCH_SIZE


def settings(**changes):
    stated = {
        "torch_dtype": "float32", "attn_implementation": "eager", "vision_attn_implementation": "sdpa",
        "gradient_checkpointing": False, "gradient_checkpointing_reentrant": False,
    }  # fmt: skip
    return SimpleNamespace(**{**stated, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


def test_it_is_a_qwen25_vl_of_about_two_and_a_half_million_parameters(folder):
    model = load_model(folder, settings())
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert 2.0e6 < model.num_parameters() < 3.0e6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(folder, tmp_path):
    again, other = build_tiny_model(tmp_path / "a", seed=0), build_tiny_model(tmp_path / "b", seed=1)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
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


def test_the_image_processor_cuts_as_smart_resize_counts(folder):
    processor = load_image_processor(folder)
    assert (processor.patch_size, processor.merge_size) == (PATCH_SIZE, MERGE_SIZE)


def test_attention_and_dtype_are_the_configured_ones(folder):
    model = load_model(folder, settings(torch_dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_training_switches_the_text_models_cache_off(folder):
    assert load_model(folder, settings()).config.text_config.use_cache is False
    assert load_model(folder, settings(), for_training=False).config.text_config.use_cache is True


def test_gradient_checkpointing_follows_the_config(folder):
    assert load_model(folder, settings(gradient_checkpointing=True)).is_activation_checkpointing
    assert not load_model(folder, settings()).is_activation_checkpointing


def one_line(error):
    return "\n" not in str(error.value)


def test_a_missing_folder_is_one_line(tmp_path):
    for load in (load_tokenizer, load_image_processor, lambda p: load_model(p, settings())):
        with pytest.raises(ModelError, match="no such model folder") as error:
            load(tmp_path / "absent")
        assert one_line(error)


def test_an_incomplete_folder_names_what_is_absent(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no tokenizer_config.json, preprocessor_config.json") as error:
        load_model(tmp_path, settings())
    assert one_line(error)


def copy(folder, target, skip=()):
    for file in folder.iterdir():
        if file.name not in skip:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_missing_or_broken_weights_are_one_line(folder, tmp_path):
    path = copy(folder, tmp_path, skip=("model.safetensors",))
    with pytest.raises(ModelError, match="cannot load the model") as error:
        load_model(path, settings())
    assert one_line(error)
    whole = (folder / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the model") as error:
        load_model(path, settings())
    assert one_line(error)


def test_weights_that_leave_parameters_unset_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy(folder, tmp_path)
    weights = load_file(path / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp.down_proj.weight" in name))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete, for example .*down_proj"):
        load_model(path, settings())


def test_another_architecture_is_refused(folder, tmp_path):
    path = copy(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ModelError, match="model_type is 'llama'") as error:
        load_model(path, settings())
    assert one_line(error)
