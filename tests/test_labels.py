"""A label and its text: what is written is read back, whatever levels a description has."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbu.labels import LEVELS, RESPONSE_TYPES, Label, LabelScheme

HIERARCHY = {"螺丝连接点": ("BBU安装螺丝", "地排处螺丝"), "线缆": ("光纤", "非光纤"), "标签贴纸": ()}
ORDERS = [o for n in (1, 2, 3) for o in permutations(RESPONSE_TYPES, n) if "object_type" in o]


@st.composite
def labels(draw: st.DrawFn) -> Label:
    """Any label that the hierarchy allows; its status may hold any text, slashes included."""
    object_type = draw(st.sampled_from(sorted(HIERARCHY)))
    properties = HIERARCHY[object_type]
    words = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"])).map(str.strip).filter(bool)
    status = "/".join(draw(st.lists(words, max_size=2)))
    return Label(object_type, draw(st.sampled_from(properties)) if properties else "", status)


@given(labels())
def test_what_is_written_is_read_back(label: Label):
    scheme = LabelScheme(HIERARCHY, RESPONSE_TYPES)
    assert scheme.parse_description(scheme.write_description(label)) == label


@pytest.mark.parametrize("response_types", ORDERS, ids=",".join)
@given(label=labels())
def test_levels_that_are_written_are_read_back_in_any_order(response_types: tuple[str, ...], label: Label):
    scheme = LabelScheme(HIERARCHY, response_types)
    written = {level for name, level in zip(RESPONSE_TYPES, LEVELS, strict=True) if name in response_types}
    label = Label(*(label.text_of(level) if level in written else "" for level in LEVELS))
    assert scheme.parse_description(scheme.write_description(label)) == label


@pytest.mark.parametrize(
    ("response_types", "description", "label"),
    [
        (RESPONSE_TYPES, "螺丝连接点/BBU安装螺丝/安装正确", Label("螺丝连接点", "BBU安装螺丝", "安装正确")),
        (RESPONSE_TYPES, " 线缆 / 光纤 ", Label("线缆", "光纤")),
        (RESPONSE_TYPES, "线缆", Label("线缆")),
        (RESPONSE_TYPES, "线缆//松动", Label("线缆", "", "松动")),
        (RESPONSE_TYPES, "标签贴纸/清晰", Label("标签贴纸", "", "清晰")),
        (RESPONSE_TYPES, "标签贴纸/清晰/破损", Label("标签贴纸", "", "清晰/破损")),
        (RESPONSE_TYPES, "线缆/光纤/松动/破损", Label("线缆", "光纤", "松动/破损")),
        (RESPONSE_TYPES, "空调/大/脏", Label("空调", "大", "脏")),
        (RESPONSE_TYPES, "线缆/地排处螺丝", Label("线缆", "地排处螺丝")),
        (RESPONSE_TYPES, "", Label("")),
        (("object_type", "extra_info"), "螺丝连接点/安装正确", Label("螺丝连接点", "", "安装正确")),
        (("object_type", "property"), "线缆/光纤/松动", Label("线缆", "光纤", "松动")),
        (("object_type",), "线缆/光纤", Label("线缆", "", "光纤")),
        (("property", "object_type"), "标签贴纸", Label("标签贴纸")),
    ],
)
def test_a_description_is_read_with_the_hierarchy(response_types: tuple[str, ...], description: str, label: Label):
    assert LabelScheme(HIERARCHY, response_types).parse_description(description) == label
