"""JSON text from anywhere, read within bounds: whatever the text holds, a value or one typed error comes out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import stat
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from bbu.errors import BBUError

_MAX_DEPTH = 64
"""Levels of lists and objects. The deepest file that is read here, a vendor's polygon, has 10; json itself gives up at
some 1,000, and code that walks a value recursively before that."""
_MAX_NUMBER_LENGTH = 300
"""Characters of a number: from 309 digits on, an integer no longer fits a float."""
_MAX_BYTES = 256 * 2**20
"""Of a file: a thousand times the largest manifest."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


T = TypeVar("T")


class JsonError(ValueError):
    """A text is no JSON that can be used. Its message says why, and where known at which line and column."""


def parse_json(text: str | bytes, *, allow_surrogates: bool = False) -> Any:
    """Parse a JSON text.

    Refuses what Python's parser accepts or fails on in other ways: NaN and Infinity, numbers that no float holds,
    integers of thousands of digits, deep nesting and, unless allowed, texts that UTF-8 cannot encode.

    Args:
        text: the text; bytes must be UTF-8, with or without a byte order mark.
        allow_surrogates: accept half of a surrogate pair in a text; such a text cannot be printed or written.

    Raises:
        JsonError: the text is refused; a message for the end of the caller's.
    """
    if isinstance(text, bytes):
        text = _decode(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError(f"nested deeper than {_MAX_DEPTH} levels") from error
    check_depth(value)
    if not allow_surrogates and (_SURROGATE.search(text) or _ESCAPED_SURROGATE.search(text)):
        _check_encodable(value)
    return value


def read_json(path: Path, error: type[BBUError], advice: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        error: the typed error that a damaged file raises.
        advice: what to do then, as the end of the message.

    Raises:
        error: the path is no plain file, or it holds no JSON object that can be used.
        OSError: the file is missing or cannot be read.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # opening a FIFO would wait for its writer
        raise error(f"{path}: not a plain file; {advice}")
    if facts.st_size > _MAX_BYTES:
        raise error(f"{path}: {facts.st_size} bytes, more than {_MAX_BYTES}; {advice}")
    try:
        value = parse_json(path.read_bytes())
    except JsonError as problem:
        raise error(f"{path}: {problem}; {advice}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object; {advice}")
    return value


def build_dataclass(cls: type[T], data: Any) -> T:
    """Build a dataclass from what JSON made of `dataclasses.asdict`: lists become tuples, texts become paths.

    Args:
        cls: its fields are texts, numbers, paths, tuples, sequences, mappings, literals, dataclasses, anything (`Any`),
            or one of these `| None`.
        data: a parsed JSON object.

    Raises:
        JsonError: a field is missing, unknown or of another type.
    """
    if not isinstance(data, dict):
        raise JsonError(f"{cls.__name__} must be an object, not {_shorten(data)}")
    hints = get_type_hints(cls)
    required = {item.name for item in dataclasses.fields(cls) if _has_no_default(item)}  # type: ignore[arg-type]
    if names := sorted((data.keys() - hints.keys()) | (required - data.keys())):
        raise JsonError(f"{cls.__name__} lacks the field, or does not know it: {_shorten(', '.join(names))}")
    return cls(**{name: _convert(value, hints[name], name) for name, value in data.items()})


def check_depth(value: Any) -> None:
    """Check that a parsed value is not nested deeper than any file of ours. Raises JsonError."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise JsonError(f"nested deeper than {_MAX_DEPTH} levels")


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: {error.reason} at byte {error.start}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a JSON number")


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_NUMBER_LENGTH:
        raise JsonError(f"a number of {len(digits)} digits, more than {_MAX_NUMBER_LENGTH}")
    return int(digits)


def _parse_float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise JsonError(f"the number {digits[:40]} is too large")
    return number


def _children(value: Any) -> list[Any]:
    """The lists and objects directly in a value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in values if isinstance(item, list | dict)]


def _check_encodable(value: Any) -> None:
    match = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
    if match:
        raise JsonError(f"a text holds half of a surrogate pair (\\u{ord(match[0]):x}), which UTF-8 cannot encode")


def _has_no_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Turn a JSON value into a field of type `hint`; `name` is for the message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(value, arguments[0], name)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0], name) for item in value)
    if origin is Sequence and isinstance(value, list):
        return [_convert(item, arguments[0], name) for item in value]
    if origin is Mapping and isinstance(value, dict):
        return {key: _convert(item, arguments[1], name) for key, item in value.items()}
    if hint is Any or (origin is Literal and value in arguments):
        return value
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str):
        return Path(value)
    # bool is a subclass of int, but true is no number.
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise JsonError(f"{name} must be {getattr(hint, '__name__', hint)}, not {_shorten(value)}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
