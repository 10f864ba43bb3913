"""Low-rank adapters on a tiny Qwen2.5-VL: where they are, what their files hold, and what merging them keeps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.read import load_config
from bbu.errors import ModelError
from bbu.models.adapters import (
    AdapterSpec,
    find_base,
    has_adapters,
    is_adapter_name,
    merge_adapters,
    round_adapters,
)
from bbu.models.qwen import BBUModel, load_model
from bbu.models.tiny import build_tiny_model
from tests.models.folders import MODEL, copy_folder, head_config, model_with_head

SPEC = AdapterSpec(rank=4, alpha=8, dropout=0.0, groups=("vision", "merger", "llm"))
TOKENS = torch.arange(2, 22).reshape(1, -1)
TOLERANCE = 1e-4
"""Of logits of size 1 in float32, where the weights were added up in another order."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_head(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of adapters that change the logits a good deal, as a checkpoint has them."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    torch.manual_seed(3)
    model = load_model(base, MODEL, head_config(), SPEC)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(base / name, folder)
    return folder


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def refusal(folder: Path, spec: AdapterSpec | None = SPEC, model_path: str = "nowhere") -> str:
    """The line with which a folder of adapters is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(folder, dataclasses.replace(MODEL, model_path=model_path), None, spec)
    (line,) = str(caught.value).splitlines()
    return line


def layers_of(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if is_adapter_name(name)}


def test_all_linear_layers_of_the_tower_the_merger_and_the_language_model_get_adapters(base: Path):
    plain, adapted = load_model(base, MODEL, head_config()), load_model(base, MODEL, head_config(), SPEC)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert layers_of(adapted) == {n for n in linear if not n.startswith("detection_head.") and n != "lm_head"}
    assert torch.equal(logits_of(plain), logits_of(adapted))


def test_a_group_with_rate_0_gets_no_adapters(base: Path):
    training = load_config("smoke", overrides=["lora_rank=4", "vision_lr=0", "merger_lr=0"]).training
    model = load_model(base, MODEL, None, AdapterSpec.from_config(training))
    assert layers_of(model) and all(name.startswith("model.language_model.") for name in layers_of(model))
    assert AdapterSpec.from_config(dataclasses.replace(training, lora_rank=0)) is None


def test_adapters_and_head_are_float32_beside_weights_in_bfloat16(base: Path):
    model = load_model(base, dataclasses.replace(MODEL, torch_dtype="bfloat16"), head_config(), SPEC)
    for name, parameter in model.named_parameters():
        is_trained = is_adapter_name(name) or name.startswith("detection_head.")
        assert parameter.dtype == (torch.float32 if is_trained else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits_of(model)
    round_adapters(model)
    assert torch.allclose(logits_of(model).float(), trained.float(), atol=0.05)


def test_the_files_are_those_of_peft_without_the_base_model(trained: Path):
    assert {path.name for path in trained.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "detection_head", "tokenizer.json",
        "tokenizer_config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert all(".lora_" in name for name in load_file(trained / "adapter_model.safetensors"))


def test_peft_loads_them_onto_the_stock_model(base: Path, trained: Path):
    from peft import PeftModel

    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    expected = logits_of(load_model(trained, MODEL, for_training=False))
    assert not torch.allclose(logits_of(stock), expected, atol=0.01)
    assert torch.allclose(logits_of(PeftModel.from_pretrained(stock, trained)), expected, atol=TOLERANCE)


def test_transformers_loads_the_folder_as_a_model(trained: Path):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained, attn_implementation="eager")
    assert torch.allclose(logits_of(stock), logits_of(load_model(trained, MODEL, for_training=False)), atol=TOLERANCE)


def test_a_saved_and_loaded_model_has_the_same_adapters_and_head(trained: Path, tmp_path: Path):
    load_model(trained, MODEL, head_config(), SPEC).save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "detection_head/model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def test_merging_keeps_the_logits_and_generation_and_leaves_a_plain_model(trained: Path, tmp_path: Path):
    model: BBUModel = load_model(trained, MODEL, for_training=False)
    expected, text = logits_of(model), model.generate(input_ids=TOKENS, max_new_tokens=12, do_sample=False)
    assert merge_adapters(model) < 1e-5 and not has_adapters(model)
    model.save_pretrained(tmp_path)
    stock, remarks = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(remarks.values()), remarks
    assert torch.allclose(logits_of(stock), expected, atol=TOLERANCE)
    assert torch.equal(stock.generate(input_ids=TOKENS, max_new_tokens=12, do_sample=False), text)


def test_merging_says_what_rounding_takes_from_the_change(trained: Path):
    """Adapters that change each weight by less than bfloat16 can hold are lost almost whole."""
    model = load_model(trained, dataclasses.replace(MODEL, torch_dtype="bfloat16"), for_training=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 1e-3
    assert merge_adapters(model) > 0.5


def test_the_base_model_is_looked_for_where_it_was_and_then_at_model_path(base: Path, trained: Path, tmp_path: Path):
    assert find_base(trained, "elsewhere") == base.absolute()
    moved, adapters = copy_folder(base, tmp_path / "moved"), copy_folder(trained, tmp_path / "adapters")
    config = json.loads((adapters / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    assert find_base(adapters, str(moved)) == moved
    assert "gone, which is not there; put it back, or name its new place with --set model_path" in refusal(adapters)
    assert "not there" in refusal(adapters, model_path=str(adapters))


def test_another_base_model_is_refused_and_the_same_one_in_another_dtype_is_not(trained: Path, tmp_path: Path):
    adapters = copy_folder(trained, tmp_path / "adapters")
    config = json.loads((adapters / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(build_tiny_model(tmp_path / "other", seed=7))
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    assert "adapters belong to other weights than those of" in refusal(adapters)
    load_model(trained, dataclasses.replace(MODEL, torch_dtype="bfloat16"), None, SPEC)


def test_other_adapters_than_the_config_asks_for_are_refused_with_the_way_to_go_on(trained: Path):
    for spec in (dataclasses.replace(SPEC, rank=8), dataclasses.replace(SPEC, groups=("llm",))):
        assert "--merge OUT) and set model_path to OUT" in refusal(trained, spec)
    assert "holds adapters, but lora_rank is 0; merge them" in refusal(trained, None)
    load_model(trained, MODEL, None, dataclasses.replace(SPEC, dropout=0.5))


def test_damaged_adapters_are_one_line(trained: Path, tmp_path: Path):
    cut = copy_folder(trained, tmp_path / "cut")
    weights = load_file(cut / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), cut / "adapter_model.safetensors")
    assert "1 weights are missing, unknown or of another shape" in refusal(cut)
    (cut / "adapter_model.safetensors").write_bytes(b"cut")
    assert "cannot load the adapters" in refusal(cut)
    (cut / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not JSON" in refusal(cut)
