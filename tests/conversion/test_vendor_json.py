"""The text of a vendor's JSON: whatever bytes it holds, an object or one reason comes out."""

from __future__ import annotations

import json
import math

import pytest

from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor_json import parse_vendor_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'{"a": "\ud83d"}', "\ufffd"),
        (r'{"a": "\ude00\ud83d"}', "\ufffd\ufffd"),
        (r'{"a": "\ud83d\ud83d\ude00"}', "\ufffd😀"),
        (r'{"a": "\\ud83d"}', r"\ud83d"),
        (r'{"a": "\\\uD83D\\"}', "\\\ufffd\\"),
        ('{"a": "x\u2028y\u0085z"}', "x\u2028y\u0085z"),
        (r'{"a": "\u0000"}', "\0"),
        ('\ufeff{"a": 1}', 1),
        ('{"a": ' + "1" * 300 + "}", int("1" * 300)),
        ('{"a": ' + "1" * 5000 + "}", math.inf),
        ('{"a": -' + "1" * 401 + "}", -math.inf),
        ('{"a": 1e999}', math.inf),
        ('{"a": 1, "a": 1}', 1),
    ],
)
def test_texts_can_be_written_and_numbers_compared(text: str, value: object) -> None:
    data = parse_vendor_json(text.encode())
    assert data == {"a": value}
    json.dumps(data, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "broken_json", "empty"),
        (b" \n", "broken_json", "empty"),
        (b"\xef\xbb\xbf", "broken_json", "Expecting value"),
        (b"[]", "broken_json", "list"),
        (b'{"a": ', "broken_json", "line 1"),
        (b'{"a": NaN}', "non_finite_number", "NaN"),
        (b'{"a": -Infinity}', "non_finite_number", "-Infinity"),
        (b"[" * 100_000 + b"]" * 100_000, "broken_json", "nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "broken_json", "nested"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "broken_json", "nested"),
        ('{"标签": "螺丝"}'.encode("gbk"), "wrong_encoding", "GBK"),
        ('{"标签": "螺丝"}'.encode("utf-16"), "wrong_encoding", "UTF-16"),
        ('{"标签": "螺丝"}'.encode("utf-16-be"), "wrong_encoding", "UTF-16"),
        ('{"标签": "螺丝"}'.encode("utf-32"), "wrong_encoding", "UTF-32"),
        (b'{"a": "\xed\xa0\xbd"}', "wrong_encoding", "not UTF-8 at byte 7"),
        (bytes(100), "broken_json", "Expecting value"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)), "wrong_encoding", "not UTF-8 at byte 0; save"),
    ],
)
def test_what_is_no_such_json_has_a_reason(data: bytes, reason: str, detail: str) -> None:
    with pytest.raises(Unusable) as caught:
        parse_vendor_json(data)
    assert caught.value.reason == reason and detail in caught.value.detail and len(caught.value.detail) < 200


def test_a_key_with_two_values_cannot_be_read_and_leaves_the_others_alone() -> None:
    data = parse_vendor_json(b'{"a": [1], "b": 1, "a": [2], "c": {"d": 1, "d": 2}}')
    assert data.get("b") == 1 and data.get("e", 3) == 3
    for read in (lambda: data.get("a"), lambda: data.get("c").items(), data.items):
        with pytest.raises(Unusable, match="stands twice"):
            read()
