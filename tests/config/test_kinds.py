"""The rules that stand in the types of the keys: each kind, and each key by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from bbu.config.domains import OWNERS, TYPES
from bbu.config.kinds import (
    NotNegativeInt,
    PositiveFloat,
    ProfileText,
    Rule,
    Share,
    is_text,
    nearest_valid,
    pattern_rule,
    range_rule,
    value_problems,
)
from bbu.config.read import load_config
from bbu.errors import ConfigError

BAD_VALUES = {
    "-0.01": """
        warmup_ratio adam_beta1 adam_beta2 eval_bootstrap_confidence val_ratio max_reject_share
        min_visible_ratio teacher_ratio eval_teacher_ratio detection_dropout detection_caption_dropout
        detection_focal_alpha detection_prior_prob detection_score_threshold lora_dropout
    """,
    "1.01": """
        warmup_ratio adam_beta1 adam_beta2 eval_bootstrap_confidence val_ratio max_reject_share
        min_visible_ratio teacher_ratio eval_teacher_ratio detection_dropout detection_caption_dropout
        detection_focal_alpha detection_prior_prob detection_score_threshold lora_dropout
    """,
    "0": """
        model_max_length generation_max_new_tokens generation_batch_size per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps adam_epsilon lr_reference_batch_size save_steps
        lora_alpha eval_steps logging_steps max_pixels max_total_length packing_buffer_size pad_to_multiple_of
        detection_num_queries detection_hidden_dim detection_num_layers detection_num_heads detection_ffn_dim
        detection_adapter_dim detection_caption_layers detection_caption_max_length detection_max_predictions
        distributed_timeout_s status_interval_s lease_timeout_s eval_claim_timeout_s
        generation_repetition_penalty dataloader_prefetch_factor
        jpeg_quality
    """,
    "-1": """
        vision_lr merger_lr llm_lr detection_lr adapter_lr lora_rank weight_decay max_grad_norm warmup_steps
        teacher_loss_weight student_loss_weight save_total_limit nan_max_skips logits_chunk_size
        eval_bootstrap_samples teacher_pool_size num_teacher_samples min_box_side convert_processes
        dataloader_num_workers detection_freeze_epochs detection_denoising_queries cpu_threads max_requeues
    """,
    "none_of_them": """
        attn_implementation vision_attn_implementation torch_dtype optim lr_scheduler_type save_strategy
        eval_strategy resume nan_policy
        unknown_label_policy exif_frame emptied_photo_policy language train_prompt eval_prompt object_order
        collator_type long_sample_policy
        log_level progress distributed_backend memory_policy
    """,
    "1.5": "save_steps eval_steps",
    "96": "jpeg_quality",
    "783": "min_pixels",
    "0.52": "eval_iou_threshold",
    "[]": "response_types",
    "[object_type, colour]": "response_types",
    "(": "site_pattern",
    "no-group": "site_pattern",
    "../x": "run_name",
}
"""A value of the right type → the keys whose rule it breaks."""
UNRULED = """
    model_path tf32 gradient_checkpointing num_train_epochs
    max_steps auto_scale_lr bf16 fp16 seed data_seed save_final
    log_weight_norms log_grad_norms vendor_dir data_root train_file val_file teacher_file image_folder
    token_map_file label_hierarchy_file split_seed remove_duplicates keep_negatives max_examples
    max_eval_examples packing_balance_vision_weight shuffle dataloader_pin_memory dataloader_persistent_workers
    dataloader_drop_last detection_enabled detection_use_language_memory detection_detach_memory
    detection_bbox_weight detection_giou_weight detection_objectness_weight detection_caption_weight
    detection_aux_weight detection_loss_weight detection_cost_bbox detection_cost_giou detection_cost_objectness
    detection_focal_gamma detection_denoising_noise output_root log_verbose tensorboard deepspeed_enabled
    deepspeed_config shape_checks
"""
"""The keys for which every value of their type is valid."""


def ruled_keys() -> list[tuple[str, str]]:
    return [(key, value) for value, keys in BAD_VALUES.items() for key in keys.split()]


def test_every_key_is_in_one_of_the_two_lists():
    ruled = {key for key, _ in ruled_keys()}
    assert ruled | set(UNRULED.split()) == OWNERS.keys() and not ruled & set(UNRULED.split())


@pytest.mark.parametrize(("key", "value"), ruled_keys())
def test_the_rule_of_every_key_is_enforced_by_name(key: str, value: str):
    with pytest.raises(ConfigError) as caught:
        load_config("base_flat", overrides=[f"{key}={value}"])
    assert any(text.startswith(f"--set {key}={value}: key {key!r} must ") for text in caught.value.findings)


@pytest.mark.parametrize("key", OWNERS)
def test_the_type_of_every_key_is_enforced_by_name(key: str):
    assert value_problems({"a": 1}, TYPES[key]) and value_problems(None, TYPES[key])


@pytest.mark.parametrize(
    ("value", "hint", "problem"),
    [
        (1.5, int, "must be a whole number, not 1.5"),
        (True, int, "must be a whole number, not True"),
        ("fast", float, "must be a number, not 'fast'"),
        (float("nan"), float, "must be a number, not nan"),
        (False, float, "must be a number, not False"),
        ("yes", bool, "must be true or false, not 'yes'"),
        (5, str, "must be a text, not 5"),
        (5, str | None, "must be a text or null, not 5"),
        ("/data", list[str], "must be a list of texts, not '/data'"),
        ({"A": 1}, dict[str, str], "must be a mapping of texts to texts, not {'A': 1}"),
        ("fr", Literal["zh", "en"], "must be one of zh, en, not 'fr'"),
        ("slrum", Literal["slurm", "local"], "must be one of slurm, local, not 'slrum'; did you mean 'slurm'?"),
        (["b"], list[Literal["x", "y"]], "must be a list of x, y, not ['b']"),
        (1.5, Share, "must be within 0..1, not 1.5"),
        (0, PositiveFloat, "must be above 0, not 0"),
        (-1, NotNegativeInt, "must not be negative, not -1"),
        (9, Annotated[int, range_rule(1, 4)], "must be within 1..4, not 9"),
        ("abcd", Annotated[str, pattern_rule("[a-c]+", "hold a, b, c only")], "must hold a, b, c only, not 'abcd'"),
        ("a\nb", ProfileText, "must hold no control character, not 'a\\nb'"),
        ("${A}", ProfileText | None, "must name only environment variables that are set, not '${A}'"),
        (["a", "b\t"], list[ProfileText], "must hold no control character, not 'b\\t'"),
        ({"A\0": ""}, dict[ProfileText, ProfileText], "must hold no control character, not 'A\\x00'"),
    ],
)
def test_a_bad_value_is_described_with_what_would_be_valid(value: Any, hint: Any, problem: str):
    assert value_problems(value, hint) == [problem]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float), (0, Share), (1.0, Share), (None, str | None), ("zh", Literal["zh", "en"]),
        ([], list[str]), ({}, dict[str, str]),
        (4, Annotated[int, range_rule(1, 4)]), ("/a b", ProfileText), (None, ProfileText | None),
    ],
)  # fmt: skip
def test_a_good_value_has_no_problem(value: Any, hint: Any):
    assert value_problems(value, hint) == []


def test_all_broken_rules_of_a_value_are_reported():
    even, small = Rule("be even", lambda value: value % 2 == 0), range_rule(0, 4)
    assert value_problems(7, Annotated[int, even, small]) == ["must be even, not 7", "must be within 0..4, not 7"]


def test_texts_are_told_from_other_types():
    assert is_text(str) and is_text(Literal["a"]) and is_text(Annotated[str, range_rule(0, 1)])
    assert not is_text(int) and not is_text(list[str]) and not is_text(str | None)


def test_only_a_near_word_is_proposed():
    assert nearest_valid("visoin_lr", OWNERS) == "; did you mean 'vision_lr'?"
    assert nearest_valid("what_is_this_key_for", OWNERS) == ""
