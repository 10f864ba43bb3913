"""Reads the text of a vendor's JSON: whatever bytes it holds, an object or one reason comes out."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from bbu.conversion.rejects import Unusable
from bbu.strict_json import JsonError, check_depth

MAX_JSON_BYTES = 4 * 2**20
"""A hundred times a real file, whose photo has at most 26 objects. It bounds the time that a wrong file takes."""
_LONGEST_INTEGER = 300
"""Digits; from 309 on, an integer no longer fits a float."""
_ESCAPES = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
"""Escaped backslashes, pairs of surrogates, and halves of such a pair, which UTF-8 cannot encode."""


class _Ambiguous(dict[str, Any]):
    """An object in which keys stand twice with different values: which of them is meant, nobody knows."""

    def __init__(self, pairs: list[tuple[str, Any]], repeated: set[str]) -> None:
        super().__init__(pairs)
        self._repeated = repeated

    def get(self, key: str, default: Any = None) -> Any:
        self._check({key})
        return super().get(key, default)

    def items(self) -> Any:
        self._check(self._repeated)
        return super().items()

    def _check(self, keys: set[str]) -> None:
        for key in sorted(keys & self._repeated):
            raise Unusable("repeated_key", f"{key!r} stands twice, with different values")


def parse_vendor_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8.

    Half a pair of surrogates becomes U+FFFD, so that every text can be written, and an integer of hundreds of digits
    becomes infinite, so that it can be compared. A key that stands twice with different values cannot be read by
    `get` or `items`: they raise Unusable.

    Raises:
        Unusable: the text is none, or no such JSON.
    """
    text = _ESCAPES.sub(lambda match: r"\ufffd" if match["half"] else match[0], _decode(data))
    try:
        value = json.loads(
            text, object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_int=_parse_integer
        )
        check_depth(value)
    except (json.JSONDecodeError, JsonError) as error:
        raise Unusable("broken_json", str(error)) from error
    except RecursionError as error:
        raise Unusable("broken_json", "nested too deeply") from error
    if not isinstance(value, dict):
        raise Unusable("broken_json", f"top level is {type(value).__name__}, not an object")
    return value


def _decode(data: bytes) -> str:
    if not data.strip():
        raise Unusable("broken_json", "the file is empty")
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8") and _is_encoded_as(data, encoding):
        raise Unusable("wrong_encoding", f"the text is in {encoding[:6].upper()}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "; it reads as GBK" if _is_encoded_as(data, "gb18030") else ""
        raise Unusable("wrong_encoding", f"not UTF-8 at byte {error.start}{guess}; save it as UTF-8") from error


def _is_encoded_as(data: bytes, encoding: str) -> bool:
    try:
        return data.decode(encoding).lstrip("\ufeff \t\r\n").startswith(("{", "["))
    except UnicodeDecodeError:
        return False


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from the keys and values of its text."""
    first: dict[str, Any] = {}
    repeated = {key for key, value in pairs if first.setdefault(key, value) != value}
    return _Ambiguous(pairs, repeated) if repeated else first


def _refuse_constant(constant: str) -> NoReturn:
    raise Unusable("non_finite_number", f"{constant} is not a JSON number")


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.copysign(math.inf, -1 if digits[0] == "-" else 1)
