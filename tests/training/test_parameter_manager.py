"""Five learning rates over a real Qwen2.5-VL, every parameter in exactly one group."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Trainer

from bbu.config.domains import TrainingConfig
from bbu.config.read import load_config
from bbu.errors import ConfigError, ModelError
from bbu.models.groups import GROUPS
from bbu.training.parameter_manager import ParameterManager, current_learning_rates

RATES = {"vision": 1e-6, "merger": 2e-6, "llm": 3e-6, "detection": 4e-6, "adapter": 5e-6}
"""The rate of each group in these tests."""
KEYS = {f"{group}_lr": rate for group, rate in RATES.items()}
"""The same by the key of the run config."""


class HeadStandIn(nn.Module):
    """Has what matters of the detection head: adapters, attention with `in_proj_bias`, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_adapter = nn.Linear(32, 16)
        self.queries = nn.Embedding(4, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)


def make_model(tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def make_model_with_head(tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    model = make_model(tied)
    model.detection_head = HeadStandIn()
    return model


def training_config(**changes) -> TrainingConfig:
    values = {**KEYS, "weight_decay": 0.1, "auto_scale_lr": False, **changes}
    return dataclasses.replace(load_config("smoke").training, **values)


def names_by_group(model: nn.Module, manager: ParameterManager) -> dict[str, set[str]]:
    """Names of the parameters in each optimizer group."""
    names = {p: n for n, p in model.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in manager.optimizer_groups()}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied):
    model = make_model_with_head(tied)
    groups = ParameterManager(model, training_config()).optimizer_groups()
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in model.parameters()}


def test_each_group_has_its_own_rate_and_its_own_modules():
    model = make_model_with_head()
    manager = ParameterManager(model, training_config())
    rates = {g["group"]: g["lr"] for g in manager.optimizer_groups()}
    assert rates == RATES and tuple(rates) == GROUPS
    names = names_by_group(model, manager)
    assert {n for n in names["merger/decay"] if "merger.mlp" not in n} == set()
    assert {n for n in names["vision/decay"] if not n.startswith("model.visual.") or "merger" in n} == set()
    assert names["adapter/decay"] == {"detection_head.vision_adapter.weight"}
    assert "detection_head.queries.weight" in names["detection/decay"]


def test_norms_and_biases_do_not_decay_where_the_stock_filter_decays_them():
    model = make_model_with_head()
    stock = {n for n, _ in model.named_parameters()} & set(Trainer.get_decay_parameter_names(None, model))
    overlooked = {n for n, _ in model.named_parameters() if n.split(".")[-2] in ("norm1", "norm2", "ln_q")}
    assert len(overlooked) == 5 and overlooked <= stock
    groups = ParameterManager(model, training_config()).optimizer_groups()
    decaying = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    ours = {n for n, p in model.named_parameters() if id(p) in decaying}
    # Apart from the overlooked norms the two rules agree.
    assert stock - ours == overlooked and ours <= stock
    assert "detection_head.attention.in_proj_bias" not in ours


def test_rate_zero_freezes_and_leaves_the_optimizer():
    model = make_model_with_head()
    manager = ParameterManager(model, training_config(vision_lr=0.0, adapter_lr=0.0))
    manager.freeze()
    trainable = {entry.group for entry in manager.parameters if entry.parameter.requires_grad}
    assert trainable == {"merger", "llm", "detection"}
    assert {g["group"] for g in manager.optimizer_groups()} == trainable


def test_a_frozen_group_does_not_move_and_the_others_do():
    model = make_model()
    manager = ParameterManager(model, training_config(vision_lr=0.0, llm_lr=1e-2))
    manager.freeze()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(manager.optimizer_groups())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moved = {entry.group for entry in manager.parameters if not torch.equal(entry.parameter, before[entry.name])}
    assert moved == {"llm"}  # no image in the batch: the merger has no gradient


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="nothing would train"):
        ParameterManager(make_model(), training_config(**dict.fromkeys(KEYS, 0.0))).freeze()


def test_tied_embeddings_count_once_and_untied_twice():
    tied = {e.name for e in ParameterManager(make_model(True), training_config()).parameters}
    untied = {e.name for e in ParameterManager(make_model(False), training_config()).parameters}
    assert untied - tied == {"lm_head.weight"}


def test_a_head_that_borrows_the_models_embedding_leaves_it_to_the_llm():
    model = make_model_with_head()
    borrowed = model.get_input_embeddings().weight
    model.detection_head.queries.weight = borrowed
    manager = ParameterManager(
        nn.ModuleDict({"detection_head": model.detection_head, "model": model}), training_config()
    )
    assert [e.group for e in manager.parameters if e.parameter is borrowed] == ["llm"]


def test_auto_scale_multiplies_every_rate_by_the_global_batch():
    batch = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_reference_batch_size": 16,
    }
    scaled = ParameterManager(make_model(), training_config(auto_scale_lr=True, **batch), world_size=8)
    assert scaled.learning_rates == pytest.approx({group: 4 * rate for group, rate in RATES.items()})
    assert ParameterManager(make_model(), training_config(**batch), world_size=8).learning_rates["llm"] == RATES["llm"]


def test_a_parameter_of_no_group_is_refused_by_name():
    model = make_model()
    model.stranger = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"stranger\.weight"):
        ParameterManager(model, training_config())


def test_norms_and_rates_are_reported_per_group():
    model = make_model()
    manager = ParameterManager(model, training_config())
    squares = sum(norm**2 for norm in manager.weight_norms(lambda parameters: nullcontext()).values())
    assert squares == pytest.approx(sum(float(p.detach().square().sum()) for p in model.parameters()), rel=1e-4)
    optimizer = torch.optim.AdamW(manager.optimizer_groups())
    assert current_learning_rates(optimizer.param_groups) == {
        f"lr/{group}": RATES[group] for group in ("vision", "merger", "llm")
    }
