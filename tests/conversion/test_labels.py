"""Descriptions: renamed level by level, chosen by response types, filtered by the hierarchy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.labels import load_rules
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorObject
from bbu.errors import BBUError
from bbu.labels import Label


def config(**changes: object) -> DataConfig:
    return dataclasses.replace(load_config("smoke").data, **changes)


def zh(label: str, **extra: str) -> VendorObject:
    return VendorObject(0, (0, 0, 1, 1), {}, {"标签": label} | extra)


@pytest.mark.parametrize(
    ("label", "description"),
    [
        ("连接点（螺丝）/BBU安装螺丝/连接正确", "螺丝连接点/BBU安装螺丝/安装正确"),
        ("BBU品牌/华为", "bbu基带处理单元/华为"),
        ("标签", "标签贴纸"),
        (" 机柜空间 / 满载 ", "机柜空间/满载"),
    ],
)
def test_token_map_renames_every_level(label: str, description: str) -> None:
    assert load_rules(config()).describe(zh(label)) == description


@pytest.mark.parametrize(
    ("label", "extra", "description"),
    [
        ("标签/清晰", {}, "标签贴纸/清晰"),
        ("标签", {"备注": "松动/破损"}, "标签贴纸/松动、破损"),
        ("标签/清晰/旧", {"备注": "破损"}, "标签贴纸/清晰/旧,破损"),
    ],
)
def test_what_follows_a_type_without_properties_is_its_status(label: str, extra: dict, description: str) -> None:
    rules = load_rules(config())
    assert rules.describe(zh(label, **extra)) == description
    status = description.removeprefix("标签贴纸/")
    assert rules.scheme.parse_description(description) == Label("标签贴纸", status=status)


def test_other_keys_are_extra_info_and_cannot_add_a_level() -> None:
    assert load_rules(config()).describe(zh("线缆/光纤", 备注="松动/破损")) == "线缆/光纤/松动、破损"


@pytest.mark.parametrize(
    ("levels", "description"),
    [
        (["object_type"], "螺丝连接点"),
        (["object_type", "property"], "螺丝连接点/BBU安装螺丝"),
        (["object_type", "extra_info"], "螺丝连接点/安装正确"),
    ],
)
def test_response_types_choose_the_levels(levels: list[str], description: str) -> None:
    rules = load_rules(config(response_types=levels))
    assert rules.describe(zh("连接点（螺丝）/BBU安装螺丝/连接正确")) == description


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("空调", "unknown_object_type"),
        ("BBU品牌/诺基亚", "unknown_property"),
        ("机柜空间", "unknown_property"),
        ("//", "missing_label"),
    ],
)
def test_label_outside_the_hierarchy_has_its_reason(label: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        load_rules(config()).describe(zh(label))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("label", "description"),
    [
        ("连接点(螺丝)/BBU安装螺丝/连接正确", "螺丝连接点/BBU安装螺丝/安装正确"),
        ("连接点（螺丝）／BBU安装螺丝／连接正确", "螺丝连接点/BBU安装螺丝/安装正确"),
        ("连接点(螺丝)/ＢＢＵ安装螺丝/连接错误", "螺丝连接点/BBU安装螺丝/安装错误"),
        ("\u3000BBU品牌\u200b/华\ufeff为", "bbu基带处理单元/华为"),
        ("螺丝连接点/BBU安装螺丝/安装正\u200b确", "螺丝连接点/BBU安装螺丝/安装正确"),
    ],
)
def test_other_widths_and_invisible_signs_are_read_without_them_and_named(label: str, description: str) -> None:
    rules = load_rules(config())
    assert rules.describe(zh(label)) == description and rules.respelled(zh(label)) == [label]


@pytest.mark.parametrize(
    "label", ["BBU品牌/华为/", "/BBU品牌//华为", " 机柜空间 / 满载 ", "标签/清晰／旧", "线缆/光纤/ＯＫ"]
)
def test_a_label_that_the_files_know_is_not_respelled(label: str) -> None:
    assert load_rules(config()).respelled(zh(label)) == []


@pytest.mark.parametrize(
    ("label", "near"),
    [("连接点螺丝/BBU安装螺丝", "连接点（螺丝）"), ("BBU品牌/华为公司", "华为"), ("机框空间/满载", "机柜空间")],
)
def test_an_unknown_label_names_the_nearest_one(label: str, near: str) -> None:
    with pytest.raises(Unusable, match=f"did you mean '{near}'"):
        load_rules(config()).describe(zh(label))


def test_object_without_a_label_in_the_chosen_language_is_rejected() -> None:
    with pytest.raises(Unusable) as caught:
        load_rules(config(language="en")).describe(zh("BBU品牌/华为"))
    assert caught.value.reason == "missing_label"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_map_file": "nothing"}, "token_map_zh"),
        ({"response_types": ["object_type", "colour"]}, "choose from object_type, property, extra_info"),
        ({"response_types": ["property"]}, "object_type among them"),
    ],
)
def test_bad_rules_say_what_would_be_right(changes: dict, message: str) -> None:
    with pytest.raises(BBUError, match=message):
        load_rules(config(**changes))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("token_map_file", "a: 1"),
        ("label_hierarchy_file", "a: b"),
        ("label_hierarchy_file", "a/b: []"),
        ("label_hierarchy_file", "a: [b/c]"),
        ("label_hierarchy_file", "a: [' b']"),
    ],
)
def test_wrong_value_in_a_label_file_is_refused(tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "labels.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BBUError, match=r"must|can be no level"):
        load_rules(config(**{key: str(tmp_path / "labels.yaml")}))
