"""The JSONL record: what conversion writes and training, inference and evaluation read.

A line is either `{"teachers": [view, ...], "student": view}` or a plain view, where a view is
`{"images": [path, ...], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "..."}], "width": W, "height": H}`.
Boxes are absolute pixels of the resized image; paths are relative to `data_root`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from bbu.errors import DataError
from bbu.strict_json import JsonError, parse_json

Box = tuple[float, float, float, float]
Role = Literal["teacher", "student"]
ROLE_CODES: dict[Role, int] = {"teacher": 1, "student": 2}
"""Values of a batch's `answer_roles`; 0 is a token nobody is supervised on."""
Source = Literal["answer", "head", "both"]
"""How objects are predicted: by the answer that the language model writes, by the detection head, or by both: the
head's finds, and weaker ones that the answer confirms."""
SOURCES: tuple[Source, ...] = get_args(Source)
REPORT_FILE, REJECTS_FILE, SHARD_FOLDER = "conversion_report.json", "rejects.jsonl", ".shards"
"""What a conversion writes into data_root beside records and images."""
IGNORE_INDEX = -100
"""Label of an unsupervised token; the default `ignore_index` of torch's cross entropy."""
_HASH = re.compile(rb"\s{0,9}[0-9a-f]{0,128}\s{0,9}")
_MAX_FINDINGS = 10
"""Damaged lines of one file that are listed before reading it stops."""
_MAX_LINE_BYTES = 16 * 2**20
"""A record with 10,000 objects has 2 MB; a longer line comes from a file that is no JSONL."""
_LEAST_SIDE = 1 - 1e-6
"""Of a box, in pixels, with room for rounding; conversion writes none that is shorter."""
_MAX_SIDE = 1_000_000
"""Pixels; the largest image that any format here can hold has 65,535."""
PHOTOS_HASH_SUFFIX = ".photos.sha256"
"""Of the file beside a records file that holds the hash over its photos."""
MAX_NAME_BYTES = 255
"""Of a file or folder, on all common filesystems."""
MAX_PATH_BYTES = 1024
"""Leaves room for data_root: Linux takes paths of 4,095 bytes."""


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
    data = _parse_line(line, where)
    if not isinstance(data, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(data).__name__}; convert again")
    if "student" not in data:
        return Record(_view(data, where))
    teachers = data.get("teachers", [])
    if not isinstance(teachers, list):
        raise DataError(f"{where}: 'teachers' must be a list of views; convert again")
    views = tuple(_view(t, f"{where}: teachers[{i}]") for i, t in enumerate(teachers))
    return Record(_view(data["student"], f"{where}: student"), views)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSONL file; raises as `read_numbered_records`."""
    return (record for _, record in read_numbered_records(path))


def read_numbered_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the line number and the record of each line that is not empty.

    A line ends at a newline alone: a text may hold U+2028, U+0085 and other separators. A byte order mark is skipped.

    Raises:
        DataError: there is no such file, or some lines are no records: file and line of the first ones, a line each.
            No record after the first damaged line is yielded.
    """
    findings: list[str] = []
    for number, line in _read_lines(path):
        try:
            record = parse_record(line, f"{path}:{number}")
        except DataError as error:
            findings.append(str(error))
        else:
            if not findings:
                yield number, record
        _stop_at_many(findings, path)
    if findings:
        raise DataError("\n".join(findings))


def read_distinct_records(path: Path, root: Path) -> list[tuple[int, Record]]:
    """Read records, with their line numbers, of which no two may be about the same photo.

    Args:
        path: the JSONL file.
        root: data_root, which the paths of photos are relative to.

    Raises:
        DataError: as `read_numbered_records`, or a photo is listed twice.
    """
    records = list(read_numbered_records(path))
    check_distinct_photos(records, path, root)
    return records


def check_distinct_photos(records: Sequence[tuple[int, Record]], path: Path, root: Path) -> None:
    """Refuse records of which two are about the same photo. Looks at every photo's file.

    Photos are the same when their paths are, in whatever spelling, or lead to one file. The photo of a record is the
    first image of its student.

    Args:
        records: records with their line numbers.
        path: their file, for messages.
        root: data_root, which the paths of photos are relative to.

    Raises:
        DataError: a photo is listed twice.
    """
    lines: dict[Hashable, int] = {}
    findings: list[str] = []
    for number, record in records:
        image = record.student.images[0]
        first = lines.setdefault(_identity_of(root / image), number)
        if first != number:
            findings.append(f"{path}:{number}: {image!r} is listed in line {first} already; remove one of the two")
        _stop_at_many(findings, path)
    if findings:
        raise DataError("\n".join(findings))


def _identity_of(photo: Path) -> Hashable:
    """What tells a file from others: its inode where it is there, else its path."""
    try:
        facts = photo.stat()
    except OSError:  # a missing photo is reported elsewhere
        return os.path.normpath(photo)
    return facts.st_dev, facts.st_ino


def _stop_at_many(findings: list[str], path: Path) -> None:
    if len(findings) >= _MAX_FINDINGS:
        raise DataError("\n".join([*findings, f"{path}: perhaps more; the first {_MAX_FINDINGS} are listed"]))


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not empty."""
    if not path.is_file():  # opening a FIFO would wait for its writer
        what = "not a plain file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; run `python -m bbu.convert` or correct the path in the config")
    with path.open("rb") as file:
        for number, line in enumerate(_bounded_lines(file, path), 1):
            if line.strip():
                yield number, _decode_line(line, f"{path}:{number}")


def _bounded_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: a line of more than {_MAX_LINE_BYTES} bytes; it is no JSONL file")
        yield line


def _decode_line(line: bytes, where: str) -> str:
    """Decode a line. Raises DataError for any encoding but UTF-8, which is that of the whole file."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else f"not UTF-8 at byte {error.start + 1}"
        raise DataError(f"{where}: {name}; save the file as UTF-8") from error
    if "\0" in text:
        raise DataError(
            f"{where}: holds zero bytes, as UTF-16 or a damaged file does; save it as UTF-8, or convert again"
        )
    return text


def photos_hash_path(records: Path) -> Path:
    """The file beside a records file that holds the SHA-256 over its photos: `val.jsonl` -> `val.photos.sha256`."""
    return records.with_suffix(PHOTOS_HASH_SUFFIX)


def read_photos_hash(records: Path) -> str | None:
    """Read the SHA-256, in hex, that conversion took over the bytes of the photos of a records file.

    Returns:
        The hash; None where the data were converted before this file existed.

    Raises:
        DataError: the file holds something else.
    """
    path = photos_hash_path(records)
    if not path.exists():
        return None
    if not path.is_file() or not _HASH.fullmatch(text := path.read_bytes()):
        raise DataError(f"{path}: holds no hash; convert again")
    return text.decode().strip() or None


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


def _parse_line(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except JsonError as error:
        raise DataError(f"{where}: {str(error).replace('line 1, ', '')}; repair or remove the line") from error


def _view(data: Any, where: str) -> View:
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected an object with 'images' and 'objects'; convert again")
    images, objects = data.get("images"), data.get("objects")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise DataError(f"{where}: 'images' must be a non-empty list of paths; convert again")
    if not isinstance(objects, list):
        raise DataError(f"{where}: 'objects' must be a list; convert again")
    for image in images:
        _check_image_path(image, where)
    width, height = (_side(data.get(name), name, where) for name in ("width", "height"))
    if (width is None) != (height is None):
        raise DataError(f"{where}: has only one of 'width' and 'height'; state both or neither")
    parsed = tuple(_object(o, width, height, f"{where}: objects[{i}]") for i, o in enumerate(objects))
    return View(tuple(images), parsed, width, height)


def _check_image_path(image: str, where: str) -> None:
    path = Path(image)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: image {image!r} lies outside data_root; use a path relative to data_root")
    too_long = len(image.encode()) > MAX_PATH_BYTES or any(len(p.encode()) > MAX_NAME_BYTES for p in path.parts)
    if "\0" in image or too_long:
        raise DataError(f"{where}: image {image[:80]!r} is no possible file name; correct the path")


def _side(value: Any, name: str, where: str) -> int | None:
    """Check a width or height in pixels."""
    if value is None:
        return None
    if not _is_number(value) or value != int(value) or not 1 <= value <= _MAX_SIDE:
        raise DataError(f"{where}: {name!r} must be a whole number of pixels, not {_shorten(value)}; convert again")
    return int(value)


def _object(data: Any, width: int | None, height: int | None, where: str) -> BBUObject:
    if not isinstance(data, dict) or not isinstance(data.get("desc"), str) or not data["desc"].strip():
        raise DataError(f"{where}: needs 'bbox_2d' and a non-empty 'desc'; convert again")
    box = data.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(c) for c in box):
        raise DataError(f"{where}: 'bbox_2d' must be four finite numbers, not {_shorten(box)}; convert again")
    x1, y1, x2, y2 = (float(c) for c in box)
    if not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise DataError(f"{where}: box {_shorten(box)} is empty or inverted; convert again")
    if min(x2 - x1, y2 - y1) < _LEAST_SIDE:
        raise DataError(
            f"{where}: box {_shorten(box)} is narrower than one pixel; boxes are pixels of the image, not shares of it"
        )
    if (width is not None and x2 > width) or (height is not None and y2 > height):
        raise DataError(f"{where}: box {_shorten(box)} leaves the {width}x{height} image; convert again")
    return BBUObject((x1, y1, x2, y2), data["desc"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
