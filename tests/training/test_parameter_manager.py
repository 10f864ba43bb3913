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
from bbu.training.parameter_manager import GROUPS, ParameterManager, current_learning_rates, group_of

RATES = {"vision_lr": 1e-6, "merger_lr": 2e-6, "llm_lr": 3e-6, "detection_lr": 4e-6, "adapter_lr": 5e-6}


class Head(nn.Module):
    """Stands where the detection head will: adapters, attention with `in_proj_bias`, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_adapter = nn.Linear(32, 16)
        self.queries = nn.Embedding(4, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)


def qwen(tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
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


def with_head(tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    model = qwen(tied)
    model.detection_head = Head()
    return model


def training(**changes) -> TrainingConfig:
    stated = {**RATES, "weight_decay": 0.1, "auto_scale_lr": False, **changes}
    return dataclasses.replace(load_config("smoke").training, **stated)


def names_by_group(model: nn.Module, manager: ParameterManager) -> dict[str, set[str]]:
    names = {p: n for n, p in model.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in manager.optimizer_groups()}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied):
    model = with_head(tied)
    groups = ParameterManager(model, training()).optimizer_groups()
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in model.parameters()}


def test_each_group_has_its_own_rate_and_its_own_modules():
    model = with_head()
    manager = ParameterManager(model, training())
    rates = {g["group"]: g["lr"] for g in manager.optimizer_groups()}
    assert rates == {group: RATES[f"{group}_lr"] for group in GROUPS}
    found = names_by_group(model, manager)
    assert {n for n in found["merger/decay"] if "merger.mlp" not in n} == set()
    assert {n for n in found["vision/decay"] if not n.startswith("model.visual.") or "merger" in n} == set()
    assert found["adapter/decay"] == {"detection_head.vision_adapter.weight"}
    assert "detection_head.queries.weight" in found["detection/decay"]


def test_norms_and_biases_do_not_decay_where_the_stock_filter_decays_them():
    model = with_head()
    stock = {n for n, _ in model.named_parameters()} & set(Trainer.get_decay_parameter_names(None, model))
    overlooked = {n for n, _ in model.named_parameters() if n.split(".")[-2] in ("norm1", "norm2", "ln_q")}
    assert len(overlooked) == 5 and overlooked <= stock
    groups = ParameterManager(model, training()).optimizer_groups()
    decaying = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    ours = {n for n, p in model.named_parameters() if id(p) in decaying}
    # Beside the overlooked norms the two rules agree.
    assert stock - ours == overlooked and ours <= stock
    assert "detection_head.attention.in_proj_bias" not in ours


def test_rate_zero_freezes_and_leaves_the_optimizer():
    model = with_head()
    manager = ParameterManager(model, training(vision_lr=0.0, adapter_lr=0.0))
    manager.freeze()
    trainable = {group_of(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"merger", "llm", "detection"}
    assert {g["group"] for g in manager.optimizer_groups()} == trainable


def test_a_frozen_group_does_not_move_and_the_others_do():
    model = qwen()
    manager = ParameterManager(model, training(vision_lr=0.0, llm_lr=1e-2))
    manager.freeze()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(manager.optimizer_groups())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moved = {group_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"llm"}  # no image in the batch: the merger has no gradient


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="nothing would train"):
        ParameterManager(qwen(), training(**dict.fromkeys(RATES, 0.0))).freeze()


def test_tied_embeddings_count_once_and_untied_twice():
    tied = {e.name for e in ParameterManager(qwen(True), training()).parameters}
    untied = {e.name for e in ParameterManager(qwen(False), training()).parameters}
    assert untied - tied == {"lm_head.weight"}


def test_a_head_that_borrows_the_models_embedding_leaves_it_to_the_llm():
    model = with_head()
    borrowed = model.get_input_embeddings().weight
    model.detection_head.queries.weight = borrowed
    manager = ParameterManager(nn.ModuleDict({"detection_head": model.detection_head, "model": model}), training())
    assert [e.group for e in manager.parameters if e.parameter is borrowed] == ["llm"]


def test_auto_scale_multiplies_every_rate_by_the_global_batch():
    batch = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_reference_batch_size": 16,
    }
    scaled = ParameterManager(qwen(), training(auto_scale_lr=True, **batch), world_size=8)
    assert scaled.learning_rates == pytest.approx({g: 4 * RATES[f"{g}_lr"] for g in GROUPS})
    assert ParameterManager(qwen(), training(**batch), world_size=8).learning_rates["llm"] == RATES["llm_lr"]


def test_a_parameter_of_no_group_is_refused_by_name():
    model = qwen()
    model.stranger = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"stranger\.weight"):
        ParameterManager(model, training())


def test_norms_and_rates_are_told_per_group():
    model = qwen()
    manager = ParameterManager(model, training())
    squares = sum(norm**2 for norm in manager.weight_norms(lambda parameters: nullcontext()).values())
    assert squares == pytest.approx(sum(float(p.detach().square().sum()) for p in model.parameters()), rel=1e-4)
    optimizer = torch.optim.AdamW(manager.optimizer_groups())
    assert current_learning_rates(optimizer.param_groups) == {
        f"lr/{g}": RATES[f"{g}_lr"] for g in ("vision", "merger", "llm")
    }
