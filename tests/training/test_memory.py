"""The estimate of a training's memory: the sums of the true 3B, and what scaled-down models allocate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.errors import ConfigError
from bbu.models.dimensions import ModelDimensions
from bbu.training.memory import GB, MemoryEstimate, announce_memory, check_card, estimate_memory, memory_table
from tests.models.qwen_3b import QWEN_3B
from tests.training.memory_trial import measure_pass

FAKE_CARD_40, FAKE_CARD_80 = int(39.5 * 2**30), int(79.1 * 2**30)
"""Bytes that A100 cards of 40 and 80 GB have; no GPU is needed to compare with them."""
PLAIN = ("deepspeed_enabled=false", "torch_dtype=float32")
UNCHUNKED = ("logits_chunk_size=0",)


def estimate(name: str, ranks: int, *overrides: str) -> MemoryEstimate:
    """The estimate of a shipped config for the true 3B."""
    return estimate_memory(load_config(name, overrides=overrides), ModelDimensions.from_config(QWEN_3B), ranks)


def gb(size: float) -> Any:
    return pytest.approx(size * GB, rel=0.02)


# --- sums of the true 3B ---


def test_the_states_are_those_of_float32_adam_and_of_zero():
    plain = estimate("base_flat", 1, *PLAIN)
    assert sum(plain.states.values()) == gb(60.3)
    assert plain.states["gradients"] == gb(15.1)  # DDP's buckets would be as large, were gradients no views into them
    assert sum(estimate("base_flat", 8).states.values()) == gb(14.1)
    assert sum(estimate("base_flat", 1).states.values()) == gb(60.3)


def test_zero_1_keeps_the_gradients_of_all_parameters(tmp_path: Path):
    path = tmp_path / "zero1.json"
    path.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}', encoding="utf-8")
    one = estimate("base_flat", 8, f"deepspeed_config={path}")
    assert sum(one.states.values()) == gb(20.7) and one.buckets < 0.1 * GB


def test_an_offloaded_optimizer_leaves_the_card_its_weights():
    offloaded = estimate("one_card_40gb", 1)
    assert offloaded.states == {"weights": gb(7.5), "gradients": 0, "optimizer": 0}
    assert offloaded.host["optimizer"] == gb(45.2)
    assert (
        offloaded.host_total > 1.4 * offloaded.host["optimizer"]
    )  # DeepSpeed keeps gradients and new weights there too


@pytest.mark.parametrize(
    ("optimizer", "gigabytes"),
    [("adamw_bnb_8bit", 7.5), ("adamw_torch_4bit", 3.8), ("lion_32bit", 15.1), ("paged_adamw_32bit", 0), ("sgd", 0),
     ("ademamix", 45.2), ("stable_adamw", 30.1)],
)  # fmt: skip
def test_optimizers_with_a_smaller_state_are_not_taken_for_adam(optimizer: str, gigabytes: float):
    assert estimate("base_flat", 1, *PLAIN, f"optim={optimizer}").states["optimizer"] == gb(gigabytes)


def test_weights_that_zero_3_keeps_on_the_host_are_not_on_the_card(tmp_path: Path):
    path = tmp_path / "zero3.json"
    section = '{"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}'
    path.write_text(f'{{"zero_optimization": {section}}}', encoding="utf-8")
    one = estimate("base_flat", 2, f"deepspeed_config={path}")
    assert one.states == {"weights": 0, "gradients": 0, "optimizer": 0}
    assert one.host["weights"] == gb(3.8) and one.host["optimizer"] == gb(22.6)


def test_what_comes_and_goes_is_a_few_gigabytes_and_was_eighteen():
    """17.8 GB were measured with autocast's cache, which held a copy of all weights but the embedding, 6.9 GB."""
    before = estimate("base_flat", 1, *PLAIN, *UNCHUNKED)
    assert before.rest + 6.9 * GB == pytest.approx(17.8 * GB, rel=0.1)
    assert estimate("one_card_80gb", 1).rest < 10 * GB
    assert estimate("base_flat", 8).rest < 10 * GB


@pytest.mark.parametrize(
    ("name", "ranks", "card"),
    [("base_flat", 8, FAKE_CARD_40), ("one_card_80gb", 1, FAKE_CARD_80), ("one_card_40gb", 1, FAKE_CARD_40)],
)
def test_each_shipped_config_fits_the_card_that_it_is_for(name: str, ranks: int, card: int):
    assert check_card(estimate(name, ranks), card, load_config(name)) is None


def test_states_that_exceed_a_card_are_refused_and_a_step_that_may_exceed_it_is_warned_of():
    with pytest.raises(ConfigError, match="use more cards with ZeRO-2"):
        check_card(estimate("base_flat", 1), FAKE_CARD_40, load_config("base_flat"))
    warning = check_card(
        estimate("one_card_80gb", 1, "gradient_checkpointing=false"), FAKE_CARD_80, load_config("one_card_80gb")
    )
    assert warning is not None and "the fullest step may need" in warning


def test_memory_policy_warn_lets_states_start_that_exceed_the_card():
    lenient = load_config("base_flat", overrides=["memory_policy=warn"])
    warning = check_card(estimate("base_flat", 1), FAKE_CARD_40, lenient)
    assert warning is not None and "use more cards with ZeRO-2" in warning


def test_a_frozen_language_model_has_no_gradients_and_no_optimizer_state():
    frozen, trained = estimate("base_flat", 8, "llm_lr=0.0"), estimate("base_flat", 8)
    assert frozen.states["weights"] == trained.states["weights"]
    assert frozen.states["optimizer"] < 0.2 * trained.states["optimizer"]
    assert "embedding gradient" not in frozen.passing or not frozen.passing["embedding gradient"]


def test_low_rank_adapters_leave_the_frozen_weights_and_little_else():
    low_rank = estimate("base_flat", 1, "deepspeed_enabled=false", "lora_rank=16")
    assert low_rank.states["weights"] == pytest.approx(7.5 * GB, rel=0.03)
    assert low_rank.states["gradients"] + low_rank.states["optimizer"] < 1 * GB and low_rank.total < 20 * GB


def test_the_table_shows_estimates_side_by_side():
    text = memory_table([estimate("one_card_40gb", ranks) for ranks in (1, 8)])
    assert "1 card" in text and "8 cards" in text
    assert {"weights", "states", "forward and backward pass", "total", "host"} <= {
        line[:28].strip() for line in text.splitlines()
    }


def test_the_start_says_nothing_without_a_config_json(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    announce_memory(load_config("base_flat"), tmp_path, 1, FAKE_CARD_40)
    assert not caplog.records


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_of_adapters_is_estimated_by_its_base_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moved: bool
):
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint-1"
    for folder in (base, checkpoint):
        folder.mkdir()
    (base / "config.json").write_text(json.dumps(QWEN_3B), encoding="utf-8")
    recorded = {"base_model_name_or_path": str(tmp_path / "gone" if moved else base)}
    (checkpoint / "adapter_config.json").write_text(json.dumps(recorded), encoding="utf-8")
    overrides = [f"model_path={base}"] if moved else []
    with caplog.at_level("INFO"):
        announce_memory(load_config("one_card_24gb", overrides=overrides), checkpoint, 1, None)
    assert "memory, estimated: 12.9 GB" in caplog.text


# --- measured peaks of scaled-down models ---

SMALL: dict[str, Any] = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3,
    },
    "vision_config": {
        "depth": 4, "hidden_size": 64, "intermediate_size": 170, "num_heads": 1, "out_hidden_size": 128,
        "fullatt_block_indexes": [1, 3],
    },
}  # fmt: skip
DEEP = SMALL | {
    "text_config": SMALL["text_config"] | {"num_hidden_layers": 8, "vocab_size": 1024},
    "vision_config": SMALL["vision_config"] | {"depth": 12, "hidden_size": 128, "num_heads": 2},
}
TRIAL = (
    "attn_implementation=varlen", "vision_attn_implementation=varlen", "max_pixels=78400", "max_total_length=1024",
    "model_max_length=1024", "teacher_ratio=0.0", "detection_dropout=0.0", "detection_caption_dropout=0.0",
    "detection_hidden_dim=64", "detection_ffn_dim=128", "detection_adapter_dim=64",
)  # fmt: skip
TOLERANCE = 0.15
"""Relative. The parts that the estimate leaves out are of this size in small models, and smaller in the true one."""


def trial_config(*overrides: str) -> DirectConfig:
    return load_config("base_flat", overrides=[*TRIAL, *overrides])


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        (SMALL, (*PLAIN, "bf16=false", "gradient_checkpointing=false", "detection_enabled=false", *UNCHUNKED)),
        (SMALL, (*PLAIN, "bf16=false", "detection_enabled=false", *UNCHUNKED)),
        (SMALL, (*PLAIN, "bf16=false", "logits_chunk_size=64")),
        (DEEP, (*PLAIN, "bf16=false", "logits_chunk_size=64")),
        (DEEP, (*PLAIN, "bf16=false", "gradient_checkpointing=false", *UNCHUNKED)),
        (SMALL, (*PLAIN, "detection_enabled=false")),
        (SMALL, ("logits_chunk_size=64", "detection_enabled=false")),
    ],
    ids=["stored", "checkpointed", "head", "deep", "deep-stored", "autocast", "bfloat16"],
)
def test_a_pass_of_a_small_model_allocates_what_is_estimated(sizes: dict[str, Any], overrides: tuple[str, ...]):
    config = trial_config(*overrides)
    expected = estimate_memory(config, ModelDimensions.from_config(sizes), 1)
    autocast = config.bf16 and not config.deepspeed_enabled
    dtype = torch.bfloat16 if config.deepspeed_enabled else torch.float32
    measured = measure_pass(config, sizes, expected.row, dtype, autocast)
    assert sum(expected.passing.values()) == pytest.approx(measured, rel=TOLERANCE)
