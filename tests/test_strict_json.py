"""JSON from anywhere: a value or one typed error, never a hang, a RecursionError or a number that is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.strict_json import JsonError, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ('{"a": 1', "line 1, column 8"),
        ("{} {}", "not JSON"),
        ("NaN", "NaN is not a JSON number"),
        ('[{"a": -Infinity}]', "-Infinity is not a JSON number"),
        ("1e999", "the number 1e999 is too large"),
        ("[" + "9" * 401 + "]", "a number of 401 digits"),
        ("-" + "9" * 5000, "a number of 5001 digits"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        ('{"a": ["\\ud83d"]}', "half of a surrogate pair"),
        ('{"\\uDE00": 1}', "half of a surrogate pair"),
        ('"\ud83d"', "half of a surrogate pair"),
        ('"ä"'.encode("utf-16"), "not UTF-8"),
        ('"螺丝"'.encode("gbk"), "not UTF-8"),
    ],
)
def test_a_text_that_is_no_usable_json_is_one_typed_error(text: str | bytes, reason: str):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 64 + "]" * 64, None),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('"\\ud83d\\ude00"', "😀"),
        ("9" * 300, int("9" * 300)),
        ("[1.5e300, -0, 1e-999]", [1.5e300, 0, 0.0]),
    ],
)
def test_unusual_json_within_the_bounds_is_read(text: str | bytes, value: object):
    parsed = parse_json(text)
    assert value is None or parsed == value


def test_half_of_a_surrogate_pair_is_read_where_it_is_allowed():
    assert parse_json('"\\ud83d"', allow_surrogates=True) == "\ud83d"


def test_a_file_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("[" * 5000)
    with pytest.raises(CheckpointError, match=r"a\.json: nested deeper than 64 levels; remove it"):
        read_json(path, CheckpointError, "remove it")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path, CheckpointError, "remove it")
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_json(path, CheckpointError, "remove it")
