"""Generated answer text to objects, without ever inventing one.

An answer is a JSON list of `{"bbox_2d": [x1, y1, x2, y2], "desc": "..."}`. It is read object by object with
the standard library: of an answer cut anywhere, every complete object is kept and the cut one is dropped.
Only malformed text that the model itself ended (EOS) goes to `json_repair`, and is flagged. Torch-free.
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

_START = re.compile(r"\[(?=\s*(?:[{\]]|$))|(?=\{)")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class ParsedAnswer:
    """What one answer said. `objects` keep the order of the answer, boxes in the answer's own pixels;
    `rejected` counts by reason what was written but is no usable object; `spans` says where in the text each
    object stands (characters, end excluded), None for one that had to be repaired."""

    objects: tuple[BBUObject, ...]
    status: ParseStatus
    rejected: dict[str, int]
    spans: tuple[tuple[int, int] | None, ...] = ()


@dataclass(frozen=True)
class _Walk:
    values: list[Any]
    spans: list[tuple[int, int] | None]
    end: int
    closed: bool


def parse_answer(text: str, *, finished: bool, width: int | None = None, height: int | None = None) -> ParsedAnswer:
    """Read the objects of one generated answer.

    finished: the model ended the answer itself (EOS); False when generation hit its length limit.
    width, height: pixels of the image the boxes refer to; where given, boxes wholly outside are rejected.
    Boxes partly outside stay as written: clipping is not this function's to decide.
    Status: ok | repaired (finished but malformed, something recovered) | truncated (not finished and the list
    not closed) | unparsed (finished, nothing recovered). Raises nothing: any text is an answer.
    """
    start = _START.search(text)
    if start is None:
        return ParsedAnswer((), "unparsed" if finished else "truncated", {})
    walk = _walk(text, start.end())
    values = list(walk.values)
    if finished and not walk.closed:
        values += _repair(text[walk.end :])
    spans = walk.spans + [None] * (len(values) - len(walk.values))
    objects, kept, rejected = _accept(values, spans, width, height)
    if not walk.closed and text[walk.end :].strip() and len(values) == len(walk.values):
        rejected["incomplete" if not finished else "malformed"] += 1
    if walk.closed and '"bbox_2d"' in text[walk.end :]:
        rejected["after_the_list"] += text.count('"bbox_2d"', walk.end)
    return ParsedAnswer(objects, _status(walk.closed, finished, bool(objects)), dict(rejected), kept)


def _status(closed: bool, finished: bool, any_objects: bool) -> ParseStatus:
    if closed:
        return "ok"
    if not finished:
        return "truncated"
    return "repaired" if any_objects else "unparsed"


def _walk(text: str, position: int) -> _Walk:
    """Decode `value, value, ...` from `position` until `]`, the end of the text or the first defect."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    values: list[Any] = []
    spans: list[tuple[int, int] | None] = []
    position = _skip(text, position)
    if text.startswith("]", position):
        return _Walk(values, spans, position, True)
    while text.startswith("{", position):
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        values.append(value)
        spans.append((position, end))
        position = _skip(text, end)
        if text.startswith("]", position):
            return _Walk(values, spans, position, True)
        if not text.startswith(",", position):
            break
        position = _skip(text, position + 1)
    return _Walk(values, spans, position, False)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """A JSON object, or None where a key is given twice: which of the two was meant is not ours to guess."""
    data = dict(pairs)
    return data if len(data) == len(pairs) else None


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _repair(tail: str) -> list[Any]:
    if "{" not in tail:
        return []
    try:
        repaired = json_repair.loads("[" + tail)
    except (ValueError, RecursionError):
        return []
    return repaired if isinstance(repaired, list) else [repaired]


def _accept(
    values: list[Any], spans: list[tuple[int, int] | None], width: int | None, height: int | None
) -> tuple[tuple[BBUObject, ...], tuple[tuple[int, int] | None, ...], Counter[str]]:
    """(usable objects, where they stand, why the others are not usable)."""
    objects: list[BBUObject] = []
    kept: list[tuple[int, int] | None] = []
    rejected: Counter[str] = Counter()
    for value, span in zip(values, spans, strict=True):
        item = _object(value, width, height)
        if isinstance(item, str):
            rejected[item] += 1
        else:
            objects.append(item)
            kept.append(span)
    return tuple(objects), tuple(kept), rejected


def _object(value: Any, width: int | None, height: int | None) -> BBUObject | str:
    """The object, or the reason why it is none."""
    if not isinstance(value, dict):
        return "not_an_object"
    box, desc = value.get("bbox_2d"), value.get("desc")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(c) for c in box):
        return "bad_box"
    if not isinstance(desc, str) or not desc.strip():
        return "no_description"
    if any("\ud800" <= character <= "\udfff" for character in desc):
        return "no_text"  # half a character, which no file can hold
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
