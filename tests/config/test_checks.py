"""Combinations of values that are fine alone and do not go together."""

from __future__ import annotations

import pytest

from bbu.config.checks import CROSS_RULES
from bbu.config.domains import OWNERS
from bbu.config.read import load_config
from bbu.errors import ConfigError


def findings_of(*overrides: str) -> list[str]:
    """Load base_flat with overrides that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load_config("base_flat", overrides=overrides)
    return list(caught.value.findings)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("bf16=true fp16=true", "bf16 and fp16 exclude each other"),
        ("max_steps=-1 num_train_epochs=0", "max_steps and num_train_epochs are both 0 or less"),
        ("min_pixels=999999999", "min_pixels 999999999 exceeds max_pixels"),
        ("vendor_dir=ds data_root=ds/out", "data_root lies inside vendor_dir"),
        ("per_device_train_batch_size=2", "collator_type packed needs per_device_train_batch_size 1"),
        ("max_total_length=100", "max_total_length 100 is below model_max_length"),
        ("dataloader_num_workers=0", "dataloader_persistent_workers needs dataloader_num_workers"),
        ("bf16=false torch_dtype=float16", "torch_dtype float16 needs fp16 true"),
        ("detection_num_heads=7", "detection_hidden_dim 256 must be a multiple of detection_num_heads 7"),
    ],
)
def test_each_combination_is_refused_alone(overrides: str, text: str):
    (finding,) = findings_of(*overrides.split())
    assert "base_flat.yaml: " in finding and text in finding


def test_a_rule_is_skipped_while_one_of_its_keys_is_wrong_and_all_others_are_reported():
    first, second = findings_of("detection_num_heads=0", "fp16=true")
    assert "key 'detection_num_heads' must be above 0, not 0" in first and "bf16 and fp16" in second


def test_the_rules_read_keys_that_exist():
    assert {key for rule in CROSS_RULES for key in rule.keys} <= OWNERS.keys()
