"""YAML from anywhere: a value or one typed error, never a hang, a RecursionError or a value that cannot be printed."""

from __future__ import annotations

import pytest

from bbu.config.strict_yaml import YamlError, parse_yaml
from bbu.errors import ConfigError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
"""Ten aliases in each of eleven levels: 10^11 values in 400 letters."""


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: " * 3,
        "- " * 3000 + "x",
        "{a: " * 30 + "1" + "}" * 30,
        BOMB,
        "a: &a [*a]",
        "a: &a {b: *a}",
        f"a: &a [{', '.join('x' * 9000)}]\nb: [{', '.join(['*a'] * 9000)}]",
        "a: " + "9" * 5000,
        "a: " + "9" * 400,
        "a: 0x" + "f" * 9000,
        "a: !!int 0b_",
        "a: !!int x",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!binary ü",
        "a: !!python/object/apply:os.system [true]",
        "a: *nothing",
        "<<: {a: 1}",
        "a: \x00",
        "a: 'b",
        "\t a: b",
    ],
    ids=lambda text: text[:20],
)
def test_a_text_that_is_no_usable_yaml_is_one_typed_error(text: str):
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "{a: 1, a: 2}", "? [a, b]\n: 1", "? {a: b}\n: 1", "1: a", "? &k [*k]\n: 1"]
)
def test_keys_are_words_and_stand_once(text: str):
    with pytest.raises((ConfigError, YamlError)) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 5e-6", {"a": 5e-6}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: '\\u2028'", {"a": "\\u2028"}),
        ('a: "\\u2028"', {"a": "\u2028"}),
        ("", None),
    ],
)
def test_unusual_yaml_within_the_bounds_is_read(text: str, value: object):
    assert parse_yaml(text) == value
