"""Generated answer text to objects, without ever inventing one.

An answer is a JSON list of `{"bbox_2d": [x1, y1, x2, y2], "desc": "..."}`. A list of usable objects and nothing else,
as most answers are, is decoded at once. Any other text is decoded object by object with the standard library: of an
answer cut anywhere, every complete object stays and the cut one is dropped. Only malformed text that the model itself
ended (EOS) goes to `json_repair`, object by object, and its objects are flagged. The time is bounded for any text.
Torch-free.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import json_repair

from bbu.schema import BBUObject

ParseStatus = Literal["ok", "repaired", "truncated", "unparsed"]
"""ok: the list was complete. repaired: the model ended a malformed answer, and some objects were recovered.
truncated: generation reached its length limit before the list was closed. unparsed: the model ended the answer, and no
object was recovered."""
_Span = tuple[int, int] | None
"""First character and the character after the last of an object in the answer; None for a repaired one."""

_START = re.compile(r"\[(?=\s*(?:[{\]]|$))|(?=\{)")
_SPACE = re.compile(r"\s*")
_OBJECT = re.compile(r'\{[^"}]*+(?:"[^"]*+"[^"}]*+)*+\}')
"""An object without objects in it, in a text without backslashes."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_BETWEEN_OBJECTS = re.compile(r"\}[\s,]*+(?=\{)")
_NUMBERS = frozenset((int, float))
_MAX_COORDINATE = 10**9
_MAX_REPAIRED = 8192
"""Characters of malformed text that are repaired at most, about 100 objects."""
_MAX_PIECE = 1024
"""Longest object in characters that is repaired: json_repair's time grows with the square of the length, or faster."""
_MAX_BRACES = 32
"""Most opening braces of such an object: json_repair's time grows with the third power of their number."""


@dataclass(frozen=True)
class ParsedAnswer:
    """The content of one answer."""

    objects: tuple[BBUObject, ...]
    """The usable objects in the order of the answer, boxes in the pixels that the answer uses."""
    status: ParseStatus
    rejected: dict[str, int]
    """Reason -> number of things that were written but are not usable objects."""
    spans: tuple[_Span, ...] = ()
    """Where in the text each object is."""


@dataclass(frozen=True)
class _DecodedList:
    """The JSON values that could be decoded one after the other."""

    values: list[Any]
    spans: list[_Span]
    end: int
    """The position in the text after the last value and what separates it from the next."""
    closed: bool
    """Whether the list's closing bracket was reached."""


def parse_answer(text: str, *, finished: bool, width: int | None = None, height: int | None = None) -> ParsedAnswer:
    """Parse the objects of one generated answer. Raises nothing: any text is an answer.

    Boxes partly outside the image stay as written; whoever uses them decides about clipping.

    Args:
        text: the answer, without special tokens.
        finished: whether the model ended the answer itself (EOS); False when generation reached its length limit.
        width: pixels of the image that the boxes refer to; where given, boxes wholly outside are rejected.
        height: likewise.
    """
    if (whole := _parse_whole(text, width, height)) is not None:
        return whole
    start = _START.search(text)
    if start is None:
        return ParsedAnswer((), "unparsed" if finished else "truncated", {})
    decoded = _decode_list(text, start.end())
    tail = text[decoded.end :]
    repaired, malformed = _repair(tail) if finished and not decoded.closed else ([], 0)
    values, spans = decoded.values + repaired, decoded.spans + [None] * len(repaired)
    objects, object_spans, rejected = _select_usable(values, spans, width, height)
    if malformed:
        rejected["malformed"] += malformed
    if not finished and not decoded.closed and tail.strip():
        rejected["incomplete"] += 1
    if decoded.closed and '"bbox_2d"' in tail:
        rejected["after_the_list"] += tail.count('"bbox_2d"')
    return ParsedAnswer(objects, _status(decoded.closed, finished, bool(objects)), dict(rejected), object_spans)


def _parse_whole(text: str, width: int | None, height: int | None) -> ParsedAnswer | None:
    """Parse an answer that is nothing but a list of usable objects.

    Returns None for every other text, and where one look does not exclude that an object has a key twice.
    """
    if "\\" in text or not text.rstrip().endswith("]"):  # a key can be written with backslashes, and be missed below
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # Each object has both keys and no other: where the text has no more of them than objects, none has one twice.
    if not isinstance(values, list) or not text.count('"bbox_2d"') == text.count('"desc"') == len(values):
        return None
    objects = []
    for value in values:
        item = _object_or_reason(value, width, height)
        if isinstance(item, str) or len(value) != 2:
            return None
        objects.append(item)
    return ParsedAnswer(tuple(objects), "ok", {}, tuple([match.span() for match in _OBJECT.finditer(text)]))


def _status(closed: bool, finished: bool, any_objects: bool) -> ParseStatus:
    if closed:
        return "ok"
    if not finished:
        return "truncated"
    return "repaired" if any_objects else "unparsed"


def _decode_list(text: str, position: int) -> _DecodedList:
    """Decode `value, value, ...` from `position` until `]`, the end of the text or the first defect."""
    values: list[Any] = []
    spans: list[_Span] = []
    position = _skip_space(text, position)
    if text.startswith("]", position):
        return _DecodedList(values, spans, position, True)
    while text.startswith("{", position):
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        values.append(value)
        spans.append((position, end))
        position = _skip_space(text, end)
        if text.startswith("]", position):
            return _DecodedList(values, spans, position, True)
        if not text.startswith(",", position):
            break
        position = _skip_space(text, position + 1)
    return _DecodedList(values, spans, position, False)


def _parse_int(digits: str) -> float:
    """Make a number; infinity where Python would refuse, or take long, to make an integer of so many digits."""
    return int(digits) if len(digits) <= 300 else math.inf


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """Make a JSON object, or None where a key is given twice: which of the two is meant cannot be known."""
    data = dict(pairs)
    return data if len(data) == len(pairs) else None


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_parse_int)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _repair(tail: str) -> tuple[list[Any], int]:
    """Recover values from malformed text, object by object, so that a defect in one object cannot reach the next.

    Returns:
        The values, and the number of pieces that none was recovered from.
    """
    values: list[Any] = []
    malformed = 0
    for piece in _pieces(tail):
        repaired = _repair_piece(piece)
        values += repaired
        malformed += not repaired
    return values, malformed


def _pieces(tail: str) -> Iterator[str]:
    """Cut malformed text behind each object; what is beyond the bound is one more piece, too long to be repaired."""
    start = 0
    for match in _BETWEEN_OBJECTS.finditer(tail, 0, _MAX_REPAIRED):
        yield tail[start : match.start() + 1]
        start = match.end()
    if tail[start:].strip():
        yield tail[start:]


def _repair_piece(piece: str) -> list[Any]:
    if "{" not in piece or len(piece) > _MAX_PIECE or piece.count("{") > _MAX_BRACES:
        return []
    try:
        repaired = json_repair.loads("[" + piece)
    # Whatever the library raises at text that it does not foresee (AssertionError, for one): this text is malformed.
    except Exception:
        return []
    values = repaired if isinstance(repaired, list) else [repaired]
    # With more keys than objects, the box of one object was joined with the description of another, or a description
    # runs on into the next object.
    return values if piece.count("bbox_2d") == piece.count("desc") == len(values) else []


def _select_usable(
    values: list[Any], spans: list[_Span], width: int | None, height: int | None
) -> tuple[tuple[BBUObject, ...], tuple[_Span, ...], Counter[str]]:
    """Return the usable objects, their spans, and the number of others by reason."""
    objects: list[BBUObject] = []
    object_spans: list[_Span] = []
    rejected: Counter[str] = Counter()
    for value, span in zip(values, spans, strict=True):
        item = _object_or_reason(value, width, height)
        if isinstance(item, str):
            rejected[item] += 1
        else:
            objects.append(item)
            object_spans.append(span)
    return tuple(objects), tuple(object_spans), rejected


def _object_or_reason(value: Any, width: int | None, height: int | None) -> BBUObject | str:
    """Return the object, or the reason why the value is not a usable one."""
    if not isinstance(value, dict):
        return "not_an_object"
    box, desc = value.get("bbox_2d"), value.get("desc")
    if not isinstance(box, list) or len(box) != 4:
        return "bad_box"
    x1, y1, x2, y2 = box
    # The bound keeps integers too long for a float away from float(), and areas finite; NaN is not below it. `type`,
    # because a bool is an int.
    if not (type(x1) in _NUMBERS and type(y1) in _NUMBERS and type(x2) in _NUMBERS and type(y2) in _NUMBERS):
        return "bad_box"
    if not (abs(x1) < _MAX_COORDINATE and abs(y1) < _MAX_COORDINATE):
        return "bad_box"
    if not (abs(x2) < _MAX_COORDINATE and abs(y2) < _MAX_COORDINATE):
        return "bad_box"
    if not isinstance(desc, str) or not (stripped := desc.strip()):
        return "no_description"
    if not desc.isprintable() and _SURROGATE.search(desc):
        return "no_text"  # half of a surrogate pair, which UTF-8 cannot encode
    if not (x1 < x2 and y1 < y2):
        return "empty_box"
    if x2 <= 0 or y2 <= 0 or (width is not None and x1 >= width) or (height is not None and y1 >= height):
        return "outside_image"
    return BBUObject((float(x1), float(y1), float(x2), float(y2)), stripped)
