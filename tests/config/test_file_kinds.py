"""A file of the wrong kind, or in the other form, is refused in one line that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bbu.config.read import CONFIG_DIR, load_config
from bbu.errors import ConfigError
from bbu.jobs.clusters import load_profile

FLAT = (CONFIG_DIR / "base_flat.yaml").read_text(encoding="utf-8")
SECTIONED = (CONFIG_DIR / "base_flat_v2.yaml").read_text(encoding="utf-8")


def without_section(name: str) -> str:
    content = yaml.safe_load(SECTIONED)
    del content[name]
    return yaml.safe_dump(content)


def findings_of(folder: Path, text: str, use_new: bool = False) -> tuple[str, ...]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), use_new=use_new)
    return tuple(finding.removeprefix(f"{path}: ") for finding in caught.value.findings)


@pytest.mark.parametrize(
    "text",
    [SECTIONED, SECTIONED.replace("training:\n", "trainning:\n"), without_section("data"), without_section("model"),
     SECTIONED + "seed: 3\n"],
    ids=["whole", "misspelled section", "no data", "no model", "one key outside"],
)  # fmt: skip
def test_five_sections_without_the_flag_are_one_line(tmp_path: Path, text: str):
    assert findings_of(tmp_path, text) == ("is in five sections; add --use-new-config",)


@pytest.mark.parametrize(
    "text", [FLAT, FLAT.replace("llm_lr", "lmm_lr").replace("\nseed", "\nsede")], ids=["whole", "two typos"]
)
def test_the_flag_with_a_flat_file_is_one_line(tmp_path: Path, text: str):
    assert findings_of(tmp_path, text, use_new=True) == ("is not in five sections; leave out --use-new-config",)


def test_a_missing_section_is_one_finding_and_not_one_for_each_of_its_keys(tmp_path: Path):
    assert findings_of(tmp_path, without_section("data"), use_new=True) == (
        "section 'data' is missing or not a mapping",
    )
    unknown, missing = findings_of(tmp_path, SECTIONED.replace("training:\n", "trainning:\n"), use_new=True)
    assert "did you mean 'training'?" in unknown and "section 'training' is missing" in missing


def test_many_findings_of_one_kind_are_counted_and_do_not_hide_the_others(tmp_path: Path):
    lines = [line for line in FLAT.splitlines() if not line.startswith("detection_")]
    findings = findings_of(tmp_path, "\n".join(lines).replace("seed: 42", "seed: x", 1))
    assert findings[3] == "… and 28 more keys are missing" and len(findings) == 5
    assert "key 'seed' must be a whole number, not 'x'" in findings[4]


def test_an_empty_file_in_five_sections_is_refused(tmp_path: Path):
    text = "model: {}\ntraining: {}\ndata: {}\ndetection: {}\ninfrastructure: {}\n"
    assert findings_of(tmp_path, text, use_new=True)[3] == "… and 146 more keys are missing"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ((CONFIG_DIR / "clusters/example.yaml").read_text(), "a cluster profile; name it with --cluster"),
        ((CONFIG_DIR / "deepspeed/zero3.json").read_text(), "DeepSpeed's configuration"),
        ((CONFIG_DIR / "labels/hierarchy_zh.yaml").read_text(), "a label file"),
        ((CONFIG_DIR / "labels/token_map_en.yaml").read_text(), "a label file"),
        ('{"model_type": "qwen2_5_vl", "torch_dtype": "bfloat16"}', "the config.json of a model"),
        ('{"info": {"width": 3}, "dataList": []}', "a vendor's annotation"),
        ('{"images": ["a.jpeg"], "objects": []}', "a record of images"),
        ("name: bbu\nchannels: [defaults]\ncount: 3\n", "copy configs/base_flat.yaml"),
    ],
)
def test_another_file_given_as_a_config_is_named_in_one_line(tmp_path: Path, text: str, kind: str):
    for use_new in (False, True):
        (finding,) = findings_of(tmp_path, text, use_new)
        assert finding.startswith("is no run config") and kind in finding


@pytest.mark.parametrize(
    "load", [load_profile, lambda name: load_config(name, use_new=False)], ids=["profile", "config"]
)
def test_a_name_that_is_a_folder_or_none_at_all_says_so(tmp_path: Path, load: Callable[[str], object]):
    for name, problem in ((str(tmp_path), "is a folder"), ("/dev/null", "no regular file"), ("nope", "neither a file")):
        with pytest.raises(ConfigError, match=problem):
            load(name)


def test_a_run_config_given_as_a_cluster_profile_is_one_line():
    for name in ("base_flat", "base_flat_v2"):
        with pytest.raises(ConfigError, match="no cluster profile but a run config; name it with --config") as caught:
            load_profile(str(CONFIG_DIR / f"{name}.yaml"))
        assert len(caught.value.findings) == 1
