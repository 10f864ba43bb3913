"""Generated answer text to objects, without ever inventing one.

An answer is a JSON list of `{"bbox_2d": [x1, y1, x2, y2], "desc": "..."}`. It is decoded object by object with the
standard library: of an answer cut anywhere, every complete object stays and the cut one is dropped. Only malformed
text that the model itself ended (EOS) goes to `json_repair`, and its objects are flagged. Torch-free.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
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
    start = _START.search(text)
    if start is None:
        return ParsedAnswer((), "unparsed" if finished else "truncated", {})
    decoded = _decode_list(text, start.end())
    values = list(decoded.values)
    if finished and not decoded.closed:
        values += _repair(text[decoded.end :])
    spans = decoded.spans + [None] * (len(values) - len(decoded.values))
    objects, object_spans, rejected = _select_usable(values, spans, width, height)
    # Count what follows the last value if it was not repaired, and objects after the end of the list.
    if not decoded.closed and text[decoded.end :].strip() and len(values) == len(decoded.values):
        rejected["incomplete" if not finished else "malformed"] += 1
    if decoded.closed and '"bbox_2d"' in text[decoded.end :]:
        rejected["after_the_list"] += text.count('"bbox_2d"', decoded.end)
    return ParsedAnswer(objects, _status(decoded.closed, finished, bool(objects)), dict(rejected), object_spans)


def _status(closed: bool, finished: bool, any_objects: bool) -> ParseStatus:
    if closed:
        return "ok"
    if not finished:
        return "truncated"
    return "repaired" if any_objects else "unparsed"


def _decode_list(text: str, position: int) -> _DecodedList:
    """Decode `value, value, ...` from `position` until `]`, the end of the text or the first defect."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    values: list[Any] = []
    spans: list[_Span] = []
    position = _skip_space(text, position)
    if text.startswith("]", position):
        return _DecodedList(values, spans, position, True)
    while text.startswith("{", position):
        try:
            value, end = decoder.raw_decode(text, position)
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """Make a JSON object, or None where a key is given twice: which of the two is meant cannot be known."""
    data = dict(pairs)
    return data if len(data) == len(pairs) else None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _repair(tail: str) -> list[Any]:
    """Recover values from malformed text; nothing where it holds no object."""
    if "{" not in tail:
        return []
    try:
        repaired = json_repair.loads("[" + tail)
    except (ValueError, RecursionError):
        return []
    return repaired if isinstance(repaired, list) else [repaired]


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
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(c) for c in box):
        return "bad_box"
    if not isinstance(desc, str) or not desc.strip():
        return "no_description"
    if any("\ud800" <= character <= "\udfff" for character in desc):
        return "no_text"  # half of a surrogate pair, which UTF-8 cannot encode
    x1, y1, x2, y2 = (float(c) for c in box)
    if not (x1 < x2 and y1 < y2):
        return "empty_box"
    if x2 <= 0 or y2 <= 0 or (width is not None and x1 >= width) or (height is not None and y1 >= height):
        return "outside_image"
    return BBUObject((x1, y1, x2, y2), desc.strip())


def _is_coordinate(value: Any) -> bool:
    # The bound also keeps integers too long for a float away from float().
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 10**9
