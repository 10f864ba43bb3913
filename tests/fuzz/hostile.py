"""Hostile values, and damage to values, texts and bytes. Everything is drawn from one `random.Random`."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Path = tuple[Any, ...]
"""The keys and indices that lead to a place in a value."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.1, -0.5, 1e-300, 1e300, 1e308,
    float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "-1", "1e999", "NaN", "true", "a" * 300, "螺丝" * 82, "/", "//", "/etc/passwd", "../../x", "a\0b",
    "\x1b[2J", "\u2028", "\x85", "\ufeff", "\ud800", "\udfff\ud800", "é", "e\u0301", "\U0001f600", "%s%n{0}{}",
    "$HOME", "${HOME}", "~",
    [], [[]], [None], [1, 2], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [[1, 2], [3, 4]], [float("nan")] * 4, [1e308] * 4,
    [10**400] * 4, [True] * 4, list(range(2000)),
    {}, {"": {}}, {"a": {"b": {"c": None}}}, {"\ud800": 1}, {"__class__": "x"}, {str(i): i for i in range(500)},
)  # fmt: skip
"""What may stand where something else was meant."""
TOKENS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"9" * 401, b"9" * 5000, b"0." + b"1" * 5000, b"\\ud800",
    b"\\u0000", b"[" * 200, b"{" * 200, b"[" * 50_000, b'{"a":' * 2000, b"]" * 200, b"\x00" * 64, b"\xff\xfe",
    b"\xef\xbb\xbf", b"\n", b"\r", b"\r\n\r\n", b"\xe2\x80\xa8", b"\xc2\x85", b"\xed\xa0\x80", b"\xc0\x80", b'"',
    b"'", b",", b":", b"{}", b"null", b"//", b"#", b"&a *a", b"!!int x", b"!!python/object:os.system", b"<<: *a", b"? ",
    b"- ", b"%YAML 9.9", b"---\n", b"\t",
)  # fmt: skip
"""What may be written into a text."""
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gbk", "gb18030", "big5", "latin-1", "cp1252")


def damage_value(rng: random.Random, value: Any) -> Any:
    """Copy a value that JSON can write and damage it in one to four places."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        value = _damage_once(rng, value)
    return value


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Damage bytes in one to eight places: flipped, cut, repeated, moved, overwritten."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        data = rng.choice(_BYTE_DAMAGE)(rng, data)
    return data


def damage_text(rng: random.Random, data: bytes) -> bytes:
    """Damage the bytes of a text: as `damage_bytes`, or written in another encoding."""
    if rng.random() < 0.3:
        text = data.decode("utf-8", "replace")
        return text.encode(rng.choice(ENCODINGS), rng.choice(("replace", "ignore")))
    return damage_bytes(rng, data)


def dump_json(rng: random.Random, value: Any) -> bytes:
    """Write a value, hostile or not, as JSON of some style; what Python's json writes and others refuse included."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.3, indent=rng.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def hostile_json(rng: random.Random, value: Any) -> bytes:
    """A JSON text made of a valid value: damaged as a value, as a text, or as both; sometimes as it was."""
    kind = rng.random()
    data = dump_json(rng, damage_value(rng, value) if kind < 0.7 else value)
    return damage_text(rng, data) if kind > 0.5 and kind < 0.98 else data


def hostile_lines(rng: random.Random, values: list[Any]) -> bytes:
    """A JSONL text of which one line is damaged, or the whole."""
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    position = rng.randrange(len(lines))
    lines[position] = hostile_json(rng, values[position]).replace(b"\n", b" ")
    data = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(lines) + rng.choice((b"", b"\n"))
    return damage_text(rng, data) if rng.random() < 0.2 else data


def _damage_once(rng: random.Random, value: Any) -> Any:
    places = list(_places(value, ()))
    path = rng.choice(places)
    return _replaced(value, path, rng.choice(_VALUE_DAMAGE)(rng, _at(value, path)))


def _places(value: Any, path: Path) -> list[Path]:
    """The paths to all values inside a value, itself included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in list(items)[:30] if len(path) < 12 for place in _places(item, (*path, key)))]


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = _replaced(value[path[0]], path[1:], new)
    return value


def _other_value(rng: random.Random, value: Any) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def _other_type(rng: random.Random, value: Any) -> Any:
    return rng.choice((str(value)[:200], [value], {"value": value}, [value, value], bool(value)))


def _fewer_items(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value:
        gone = rng.choice(list(value))
        return {key: item for key, item in value.items() if key != gone}
    return value[: rng.randrange(len(value))] if isinstance(value, list | str) and value else None


def _more_items(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        return value | {rng.choice(("", "id", "螺丝", "x" * 200)): _other_value(rng, value)}
    if isinstance(value, list):
        return [*value, *value[-1:], _other_value(rng, value)]
    return f"{value}"[:200] + rng.choice(("\u2028", "/", "\0", "0", "\ud800")) if isinstance(value, str) else 10**20


def _deeper(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((3, 20, 70, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


_VALUE_DAMAGE: tuple[Callable[[random.Random, Any], Any], ...] = (
    _other_value, _other_value, _other_type, _fewer_items, _more_items, _deeper,
)  # fmt: skip


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    position = rng.randrange(len(data))
    return data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 16, 200)) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 8, 64, 400))]
    return data[:start] + piece * rng.choice((2, 2, 3, 50)) + data[start + len(piece) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    position = rng.randrange(len(data) + 1)
    return data[:position] + rng.choice(TOKENS) + data[position:]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = rng.choice((bytes(64), rng.randbytes(16), b"\xff" * 8, rng.choice(TOKENS)[:500]))
    return data[:start] + piece + data[start + len(piece) :]


_BYTE_DAMAGE = (_flip, _flip, _cut, _drop, _repeat, _insert, _insert, _overwrite)
