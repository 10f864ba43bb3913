"""Reads a vendor's JSON, in both dialects, into typed photos, and rejects with a reason what it cannot read.

Dialect A: `dataList` of items with two opposite corners, or all corners, and `properties`.
Dialect B: `markResult.features`, GeoJSON-like, with `properties.content` (English) and `contentZh` (Chinese).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from bbu.conversion.rejects import Reject, Unusable
from bbu.conversion.vendor_json import parse_vendor_json
from bbu.schema import Box

LABEL_KEY_EN, LABEL_KEY_ZH = "label", "标签"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""A number that a tool wrote as a text."""
_MOST_OBJECTS = 5_000
"""Of a photo. Real ones have at most 26."""
_LONGEST_TEXT = 2_000
"""Characters of a label or remark. A longer one is no remark, but a file that was pasted."""
_LARGEST_NUMBER = 1e9
"""Far above any coordinate; it keeps NaN and integers of hundreds of digits out of the arithmetic."""
_CORNER_DISTANCE = 1.0
"""Pixels by which the corners of one object may differ between its two annotations: one is rounded."""


@dataclass(frozen=True)
class VendorObject:
    """One annotation."""

    index: int
    """Its number among the photo's annotations, from 0."""
    box: Box
    """(x1, y1, x2, y2) in the vendor's pixels."""
    content: dict[str, str]
    """English texts by key; empty where the vendor gives none."""
    content_zh: dict[str, str]
    """Chinese texts by key; empty where the vendor gives none."""


@dataclass(frozen=True)
class VendorPhoto:
    """One vendor JSON."""

    name: str
    """Path below the vendor folder, without suffix."""
    width: int
    """Of the image, in pixels, as the vendor states it."""
    height: int
    """Of the image, in pixels, as the vendor states it."""
    dialect: str
    """A or B."""
    objects: tuple[VendorObject, ...]
    """The annotations that can be read."""
    rejects: tuple[Reject, ...] = ()
    """The annotations that cannot be read."""


def read_photo(name: str, text: bytes) -> VendorPhoto:
    """Read one vendor JSON; raises Unusable when the file as a whole cannot be used."""
    data = parse_vendor_json(text)
    width, height = _size(data)
    readings = [_read_items(name, dialect, items) for dialect, items in _annotations(data)]
    dialect, objects, rejects = readings[0]
    if len(readings) > 1 and not _agree(objects, readings[1][1]):
        counts = " and ".join(f"{len(others)} objects in dialect {letter}" for letter, others, _ in readings)
        raise Unusable("two_annotations", f"'dataList' and 'markResult' are both filled and differ: {counts}")
    return VendorPhoto(name, width, height, dialect, tuple(objects), tuple(rejects))


def _size(data: dict[str, Any]) -> tuple[int, int]:
    info = data.get("info")
    if not isinstance(info, dict):
        raise Unusable("missing_size", "there is no 'info' with width and height")
    return _side(info, "width"), _side(info, "height")


def _side(info: dict[str, Any], key: str) -> int:
    side = _number(info.get(key))
    if side is None or side <= 0 or side != int(side):
        raise Unusable("missing_size", f"info.{key} must be a whole number of pixels, not {str(info.get(key))[:80]!r}")
    return int(side)


def _annotations(data: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """(dialect, annotations) of those of the two lists that are filled; of an empty one where none is."""
    lists = {"A": data.get("dataList"), "B": _features(data.get("markResult"))}
    chosen = [pair for pair in lists.items() if pair[1]] or [pair for pair in lists.items() if pair[1] == []][:1]
    if not chosen:
        raise Unusable("unknown_dialect", "neither 'dataList' nor 'markResult' holds a list of annotations")
    for dialect, items in chosen:
        if not isinstance(items, list):
            raise Unusable("unknown_dialect", f"dialect {dialect}: the annotations are not a list")
        if len(items) > _MOST_OBJECTS:
            raise Unusable("too_many_objects", f"{len(items)} annotations, more than {_MOST_OBJECTS}")
    return chosen


def _features(mark: Any) -> Any:
    """The annotations in `markResult`. Raises Unusable where they stand in it in another form, so that none is lost."""
    if isinstance(mark, dict) and mark.get("features"):
        return mark["features"]
    lists = [value for value in (mark.values() if isinstance(mark, dict) else [mark]) if isinstance(value, list)]
    if any(isinstance(item, dict) for value in lists for item in value):
        raise Unusable("unknown_dialect", "'markResult' has no 'features', but a list in another place")
    return mark.get("features") if isinstance(mark, dict) else None


def _read_items(name: str, dialect: str, items: list[Any]) -> tuple[str, list[VendorObject], list[Reject]]:
    read = _object_a if dialect == "A" else _object_b
    objects: list[VendorObject] = []
    rejects: list[Reject] = []
    for index, item in enumerate(items):
        try:
            objects.append(read(index, item))
        except Unusable as unusable:
            rejects.append(Reject(name, unusable.reason, unusable.detail, index))
    return dialect, objects, rejects


def _agree(first: list[VendorObject], second: list[VendorObject]) -> bool:
    """Whether two lists name the same objects, in any order."""
    pairs = zip(sorted(first, key=_box_of), sorted(second, key=_box_of), strict=False)
    return len(first) == len(second) and all(_is_same(one, other) for one, other in pairs)


def _box_of(item: VendorObject) -> Box:
    return item.box


def _is_same(first: VendorObject, second: VendorObject) -> bool:
    texts = [(first.content, second.content, LABEL_KEY_EN), (first.content_zh, second.content_zh, LABEL_KEY_ZH)]
    return all(abs(a - b) <= _CORNER_DISTANCE for a, b in zip(first.box, second.box, strict=True)) and all(
        one[key] == other[key] for one, other, key in texts if key in one and key in other
    )


def _object_a(index: int, item: Any) -> VendorObject:
    item = _mapping(item)
    points = _points(item.get("coordinates"))
    return _object(index, points, _mapping(item.get("properties")))


def _object_b(index: int, item: Any) -> VendorObject:
    item = _mapping(item)
    points = _points(_mapping(item.get("geometry")).get("coordinates"))
    return _object(index, points, _mapping(item.get("properties")))


def _object(index: int, points: list[tuple[float, float]], properties: dict[str, Any]) -> VendorObject:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    content, content_zh = _contents(properties)
    return VendorObject(index, (min(xs), min(ys), max(xs), max(ys)), content, content_zh)


def _contents(properties: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(English, Chinese) texts; flat properties count as the language whose label key they hold."""
    if "content" in properties or "contentZh" in properties:
        return _texts(properties.get("content")), _texts(properties.get("contentZh"))
    texts = _texts(properties)
    return (texts if LABEL_KEY_EN in texts else {}), (texts if LABEL_KEY_ZH in texts else {})


def _texts(data: Any) -> dict[str, str]:
    """The non-empty texts of a content block; the vendor writes some values as lists of texts."""
    if not isinstance(data, dict):
        return {}
    joined = {key: _text(value) for key, value in data.items()}
    return {key: value for key, value in joined.items() if value}


def _text(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise Unusable("non_finite_number", "a number among the texts has hundreds of digits")
    if isinstance(value, list):
        text = ",".join(text for text in map(_text, value) if text)
    else:
        text = str(value).strip() if isinstance(value, str | int | float) else ""
    if len(text) > _LONGEST_TEXT:
        raise Unusable("oversized_text", f"a text of {len(text)} characters, more than {_LONGEST_TEXT}: {text[:20]}…")
    return text


def _points(data: Any) -> list[tuple[float, float]]:
    """Flat or once-nested list of at least two [x, y]: the corners of a box or of a polygon."""
    if isinstance(data, list) and data and isinstance(data[0], list) and data[0] and isinstance(data[0][0], list):
        data = data[0]
    points = [_point(p) for p in data] if isinstance(data, list) else [None]
    if None in points:
        raise Unusable("bad_coordinates", f"{str(data)[:80]} is not a list of [x, y] numbers")
    if len(points) < 2:
        raise Unusable("bad_coordinates", f"{len(points)} points do not span a box")
    return [point for point in points if point]


def _point(data: Any) -> tuple[float, float] | None:
    if not isinstance(data, list) or len(data) < 2:
        return None
    x, y = _number(data[0]), _number(data[1])
    return None if x is None or y is None else (x, y)


def _number(value: Any) -> float | None:
    """A number, or a text that holds one; None for everything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_NUMBER:
        return None
    return float(value)


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Unusable("bad_object", f"expected a JSON object, found {type(data).__name__}")
    return data
