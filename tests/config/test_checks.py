"""Combinations of values that are fine alone and do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.config.checks import CROSS_RULES, OUTPUT_RULES
from bbu.config.domains import OWNERS
from bbu.config.read import CONFIG_DIR, load_config, load_recorded_config
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
        ("save_strategy=no save_final=false", "save_strategy no with save_final false would lose"),
        ("vision_lr=0 merger_lr=0 llm_lr=0 detection_enabled=false", "every learning rate in use is 0"),
        ("lora_rank=8 vision_lr=0 merger_lr=0 llm_lr=0", "so no layer would get an adapter"),
        ("lora_rank=8 torch_dtype=bfloat16 bf16=false", "torch_dtype bfloat16 with lora_rank 8 needs mixed precision"),
        ("teacher_loss_weight=0 student_loss_weight=0 detection_enabled=false", "nothing would be learnt"),
        (
            "detection_enabled=true detection_freeze_epochs=2 max_steps=-1 num_train_epochs=2",
            "detection_freeze_epochs 2 covers all 2 epochs",
        ),
        ("min_pixels=999999999", "min_pixels 999999999 exceeds max_pixels"),
        ("vendor_dir=ds data_root=ds/out", "data_root lies inside vendor_dir"),
        ("vendor_dir=./ds data_root=x/../ds/out", "data_root lies inside vendor_dir"),
        ("vendor_dir=out/ds_rescaled data_root=out", "lie in each other"),
        ("vendor_dir=out/ds_rescaled/vendor data_root=out", "lie in each other"),
        ("vendor_dir=out/vendor data_root=out image_folder=.", "lie in each other"),
        ("val_file=train.jsonl", "train_file 'train.jsonl' and val_file 'train.jsonl' would overwrite each other"),
        ("val_file=./train.jsonl", "would overwrite each other"),
        ("val_file=sub//a.jsonl teacher_file=sub/./a.jsonl", "would overwrite each other"),
        ("teacher_file=TRAIN.jsonl", "would overwrite each other"),
        ("val_file=é.jsonl teacher_file=e\u0301.jsonl", "would overwrite each other"),
        ("val_file=train.json", "would overwrite each other"),
        ("val_file=train.photos.sha256", "would overwrite each other"),
        ("val_file=train.jsonl/val.jsonl", "would overwrite each other"),
        ("val_file=sub/../val.jsonl", "val_file 'sub/../val.jsonl' must be a path below data_root"),
        ("val_file=../val.jsonl", "must be a path below data_root"),
        ("teacher_file=/tmp/teacher.jsonl", "must be a path below data_root"),
        ("image_folder=../images", "must be a path below data_root"),
        ("image_folder=", "must be a path below data_root"),
        ("val_file=.", "must name a file"),
        ("train_file=ds_rescaled/S1-0001.jpeg", "must name a file, and none that an image could have"),
        ("teacher_file=rejects.jsonl", "is a name of the conversion's own reports"),
        ("train_file=Conversion_Report.json", "is a name of the conversion's own reports"),
        ("image_folder=.shards", "is a name of the conversion's own reports"),
        ("image_folder=train.jsonl", "image_folder 'train.jsonl' is the file that train_file names"),
        ("image_folder=val.jsonl/images", "is the file that val_file names"),
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
    assert {key for rule in (*CROSS_RULES, *OUTPUT_RULES) for key in rule.keys} <= OWNERS.keys()


@pytest.mark.parametrize("override", ["image_folder=.", "image_folder=images/a", "val_file=sub/train.jsonl"])
def test_names_that_do_not_meet_are_fine(override: str):
    load_config("base_flat", overrides=[override])


def test_a_recorded_config_may_score_any_file(tmp_path: Path):
    recorded = tmp_path / "run_config.yaml"
    recorded.write_text((CONFIG_DIR / "smoke.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recorded_config(recorded, ["val_file=train.jsonl"]).val_file == "train.jsonl"
