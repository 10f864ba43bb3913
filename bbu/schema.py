"""The JSONL record: what conversion writes and training, inference and evaluation read.

A line is either `{"teachers": [view, ...], "student": view}` or a plain view, where a view is
`{"images": [path, ...], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "..."}], "width": W, "height": H}`.
Boxes are absolute pixels of the resized image; paths are relative to `data_root`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from bbu.errors import DataError

Box = tuple[float, float, float, float]
Role = Literal["teacher", "student"]
ROLE_CODES: dict[Role, int] = {"teacher": 1, "student": 2}
"""Values of a batch's `answer_roles`; 0 is a token nobody is supervised on."""
Source = Literal["answer", "head", "both"]
"""How objects are predicted: by the answer that the language model writes, by the detection head, or by both merged."""
SOURCES: tuple[Source, ...] = get_args(Source)
IGNORE_INDEX = -100
"""Label of an unsupervised token; the default `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class BBUObject:
    """One described part."""

    bbox_2d: Box
    """(x1, y1, x2, y2) in absolute pixels of the resized image."""
    desc: str
    """Its description: the levels of its label joined by `/`; see `bbu.labels`."""


@dataclass(frozen=True)
class View:
    """Images that are seen together, and their objects."""

    images: tuple[str, ...]
    """Paths relative to data_root."""
    objects: tuple[BBUObject, ...]
    """The objects of the first image."""
    width: int | None = None
    """Of the first image, in pixels; None where the record does not say."""
    height: int | None = None
    """Of the first image, in pixels; None where the record does not say."""


@dataclass(frozen=True)
class Record:
    """One training sample."""

    student: View
    """The view whose objects are to be learnt."""
    teachers: tuple[View, ...] | None = None
    """Worked examples before it; None for a plain record, whose teachers are drawn from the pool."""


def parse_record(line: str, where: str) -> Record:
    """Parse and check one JSONL line.

    Args:
        line: the line, with or without its newline.
        where: the place that opens every error message, such as `file:line`.

    Raises:
        DataError: the line is not a record that training can use.
    """
    data = _loads(line, where)
    if not isinstance(data, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(data).__name__}; convert again")
    if "student" not in data:
        return Record(_view(data, where))
    teachers = tuple(_view(t, f"{where}: teachers[{i}]") for i, t in enumerate(data.get("teachers", ())))
    return Record(_view(data["student"], f"{where}: student"), teachers)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSONL file. Raises DataError that names file and line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `python -m bbu.convert` or correct the path in the config")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_record(line, f"{path}:{number}")


def photos_hash_path(records: Path) -> Path:
    """The file beside a records file that holds the SHA-256 over its photos: `val.jsonl` -> `val.photos.sha256`."""
    return records.with_suffix(".photos.sha256")


def read_photos_hash(records: Path) -> str | None:
    """Read the SHA-256, in hex, that conversion took over the bytes of the photos of a records file.

    Returns:
        The hash; None where the data were converted before this file existed.
    """
    try:
        return photos_hash_path(records).read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None


def view_to_dict(view: View) -> dict[str, Any]:
    """Convert a view to its JSON form; whole coordinates become integers."""
    data: dict[str, Any] = {
        "images": list(view.images),
        "objects": [{"bbox_2d": [_plain(c) for c in o.bbox_2d], "desc": o.desc} for o in view.objects],
    }
    if view.width is not None:
        data |= {"width": view.width, "height": view.height}
    return data


def dump_line(view: View) -> str:
    """Write a view as one JSONL line, newline included; equal views give equal bytes."""
    return json.dumps(view_to_dict(view), ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _loads(line: str, where: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise DataError(f"{where}: {name} is not a JSON number; repair or remove the record")

    try:
        return json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); repair the line") from error


def _view(data: Any, where: str) -> View:
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected an object with 'images' and 'objects'; convert again")
    images, objects = data.get("images"), data.get("objects")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        raise DataError(f"{where}: 'images' must be a non-empty list of paths; convert again")
    if not isinstance(objects, list):
        raise DataError(f"{where}: 'objects' must be a list; convert again")
    for image in images:
        _check_inside(image, where)
    width, height = data.get("width"), data.get("height")
    parsed = tuple(_object(o, width, height, f"{where}: objects[{i}]") for i, o in enumerate(objects))
    return View(tuple(images), parsed, width, height)


def _check_inside(image: str, where: str) -> None:
    path = Path(image)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: image {image!r} lies outside data_root; use a path relative to data_root")


def _object(data: Any, width: int | None, height: int | None, where: str) -> BBUObject:
    if not isinstance(data, dict) or not isinstance(data.get("desc"), str) or not data["desc"].strip():
        raise DataError(f"{where}: needs 'bbox_2d' and a non-empty 'desc'; convert again")
    box = data.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(c) for c in box):
        raise DataError(f"{where}: 'bbox_2d' must be four finite numbers, not {box!r}; convert again")
    x1, y1, x2, y2 = (float(c) for c in box)
    if not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise DataError(f"{where}: box {box} is empty or inverted; convert again")
    if (width is not None and x2 > width) or (height is not None and y2 > height):
        raise DataError(f"{where}: box {box} leaves the {width}x{height} image; convert again")
    return BBUObject((x1, y1, x2, y2), data["desc"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
