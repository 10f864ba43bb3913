"""What a run config accepts and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.config.read import CONFIG_DIR, load_config, load_recorded_config
from bbu.config.yaml_files import MAX_FILE_BYTES
from bbu.errors import ConfigError

FLAT = (CONFIG_DIR / "base_flat.yaml").read_text(encoding="utf-8")


def refused(tmp_path: Path, text: str, **kwargs) -> tuple[str, ...]:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), **kwargs)
    return caught.value.findings


def without(key: str) -> str:
    return "\n".join(line for line in FLAT.splitlines() if not line.startswith(f"{key}:"))


def test_both_forms_of_the_base_config_are_equal():
    assert load_config("base_flat") == load_config("base_flat_v2", use_new=True)


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("one_card_80gb", {"torch_dtype", "deepspeed_enabled", "gradient_accumulation_steps"}),
        ("one_card_40gb", {"deepspeed_config", "gradient_accumulation_steps"}),
    ],
)
def test_the_configs_for_one_card_differ_from_the_base_config_in_what_memory_needs(name: str, differences: set[str]):
    base, other = load_config("base_flat").as_flat(), load_config(name).as_flat()
    assert {key for key in base if base[key] != other[key]} == differences


def test_numbers_as_people_write_them_are_numbers():
    assert load_config("base_flat", overrides=["llm_lr=5e-6"]).llm_lr == 5e-6
    assert load_config("base_flat", overrides=["llm_lr=1E-05"]).llm_lr == 1e-5


def test_a_missing_key_is_named(tmp_path: Path):
    assert any("missing key 'llm_lr'" in f and "run.yaml" in f for f in refused(tmp_path, without("llm_lr")))


def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path):
    (finding,) = refused(tmp_path, FLAT + "visoin_lr: 1e-6\n")
    assert "unknown key 'visoin_lr'" in finding and "'vision_lr'" in finding


def test_a_duplicate_key_names_both_lines(tmp_path: Path):
    (finding,) = refused(tmp_path, FLAT + "llm_lr: 1e-6\n")
    assert "duplicate key 'llm_lr'" in finding


@pytest.mark.parametrize(
    "key, value",
    [("bf16", '"yes please"'), ("seed", "1.5"), ("seed", "true"), ("llm_lr", "fast"), ("llm_lr", ".nan"),
     ("response_types", "property"), ("run_name", "5")],
)  # fmt: skip
def test_a_wrong_type_is_refused(tmp_path: Path, key: str, value: str):
    assert any(repr(key) in f for f in refused(tmp_path, f"{without(key)}\n{key}: {value}\n"))


def test_all_errors_come_at_once(tmp_path: Path):
    findings = refused(tmp_path, without("llm_lr").replace("seed: 42", "seed: x", 1) + "\nwhat_is_this_key_for: 1\n")
    assert len(findings) == 3


@pytest.mark.parametrize(
    "override",
    ["bf16=false fp16=true torch_dtype=nope", "min_pixels=999999999", "jpeg_quality=100", "teacher_ratio=1.5",
     "site_pattern=(", "response_types=[colour]", "run_name=../x", "save_steps=0", "llm_lr=-1",
     "detection_num_heads=7", "per_device_train_batch_size=2", "no_such_key=1", "no_equals_sign",
     "vendor_dir=ds data_root=ds/out"],
)  # fmt: skip
def test_values_and_combinations_that_cannot_work_are_refused(override: str):
    with pytest.raises(ConfigError):
        load_config("base_flat", overrides=override.split(" "))


def test_a_key_in_the_wrong_section_names_the_right_one(tmp_path: Path):
    text = (CONFIG_DIR / "base_flat_v2.yaml").read_text(encoding="utf-8")
    moved = text.replace("  llm_lr: 5e-6\n", "").replace("data:\n", "data:\n  llm_lr: 5e-6\n", 1)
    assert any("belongs to section 'training'" in f for f in refused(tmp_path, moved, use_new=True))


def test_the_sectioned_form_needs_its_flag(tmp_path: Path):
    text = (CONFIG_DIR / "base_flat_v2.yaml").read_text(encoding="utf-8")
    assert any("--use-new-config" in f for f in refused(tmp_path, text))


def test_the_flag_is_refused_for_the_flat_form(tmp_path: Path):
    (finding,) = refused(tmp_path, FLAT, use_new=True)
    assert "leave out --use-new-config" in finding


def test_a_bare_name_is_looked_up_in_the_project_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smoke", "smoke.yaml"):
        (tmp_path / name).write_text(FLAT, encoding="utf-8")
    assert load_config("smoke").source == CONFIG_DIR / "smoke.yaml"
    assert load_config("smoke.yaml").source == Path("smoke.yaml")


def test_files_are_loaded_safely_and_size_capped(tmp_path: Path):
    assert "not valid YAML" in refused(tmp_path, "a: !!python/object/apply:os.system ['true']\n")[0]
    assert "larger than" in refused(tmp_path, "#" * (MAX_FILE_BYTES + 1))[0]


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match="smoke"):
        load_config("no-such-config")


OLD_RECORD = Path(__file__).parents[1] / "run/old_run_folder/checkpoint-6/run_config.yaml"


def test_a_retired_key_says_why_it_is_no_longer_read():
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", overrides=["tensorboard_flush_secs=5"])
    assert "'tensorboard_flush_secs' is no longer read: event files are flushed every 10 seconds" in str(caught.value)
    with pytest.raises(ConfigError, match="missing key 'exif_frame'"):
        load_config(str(OLD_RECORD))


def test_a_config_that_an_old_run_recorded_is_loaded_with_what_that_run_did():
    config = load_recorded_config(OLD_RECORD, ["eval_prompt=detailed"])
    assert (config.exif_frame, config.emptied_photo_policy) == ("auto", "negative")
    assert (config.max_steps, config.eval_prompt) == (6, "detailed")


@pytest.mark.parametrize("name", ["base_flat", "one_card_80gb", "one_card_40gb", "smoke"])
def test_a_shipped_config_asks_what_it_trained(name: str):
    config = load_config(name)
    assert config.train_prompt == config.eval_prompt
