"""The predictions file: what inference writes, one JSON line an image, and evaluation scores."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from bbu.errors import DataError
from bbu.schema import BBUObject
from bbu.strict_json import JsonError, build_dataclass, parse_json

_STATUSES = ("ok", "repaired", "truncated", "unparsed", "failed")
_FACTS = ("image", "status", "score_source", "width", "height", "rejected")
"""Fields of a line beside its objects."""
_MAX_COORDINATE = 1e9
"""As answers are bounded by `bbu.inference.parse`."""


@dataclass(frozen=True)
class Prediction:
    """Everything predicted for one image."""

    image: str
    """path relative to data_root, as in the ground truth"""
    objects: tuple[BBUObject, ...]
    """the predicted objects; boxes in absolute pixels of the resized image"""
    scores: tuple[float | None, ...] = ()
    """a score for each object, None for one without; empty where no object has one"""
    status: str = "ok"
    """what became of the image or its answer: one of _STATUSES"""
    score_source: str | None = None
    """what the scores are, such as `objectness`; scores of different sources cannot be compared"""
    width: int | None = None
    """of the resized image, in pixels"""
    height: int | None = None
    """of the resized image, in pixels"""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """parts of the answer that were rejected: how many for which reason"""


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions JSONL file; raises DataError naming file and line."""
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise DataError(f"{path}: cannot be read: no plain file; run the predictions again")
    # Not splitlines(): a generated text may hold U+2028 and its like, which are no ends of a JSON line.
    lines = path.read_bytes().split(b"\n")
    return [_prediction(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def append_predictions(file: TextIO, predictions: Sequence[Prediction]) -> None:
    """Append predictions to an open file, and sync it, so that no kill of this process loses them."""
    file.write("".join(map(_dump_prediction, predictions)))
    file.flush()
    os.fsync(file.fileno())


def _dump_prediction(prediction: Prediction) -> str:
    """One line of the file, newline included; objects have a score only where there is one."""
    scores = prediction.scores or (None,) * len(prediction.objects)
    objects = [
        {"bbox_2d": list(item.bbox_2d), "desc": item.desc} | ({} if score is None else {"score": score})
        for item, score in zip(prediction.objects, scores, strict=True)
    ]
    facts = {name: getattr(prediction, name) for name in _FACTS}
    return json.dumps(facts | {"objects": objects}, ensure_ascii=False, allow_nan=False) + "\n"


def drop_cut_line(path: Path) -> None:
    """Cut off a last line that has no newline: its writer was killed while it wrote."""
    data = path.read_bytes() if path.exists() else b""
    size_of_lines = data.rfind(b"\n") + 1
    if size_of_lines < len(data):
        with path.open("rb+") as file:
            file.truncate(size_of_lines)


def _prediction(line: bytes, where: str) -> Prediction:
    try:
        return _prediction_of(parse_json(line))
    except JsonError as error:
        advice = "remove the line, and its image is predicted again"
        raise DataError(f"{where}: no prediction record ({error}); {advice}") from error


def _prediction_of(data: Any) -> Prediction:
    """The prediction in a parsed line. Raises JsonError where it holds none."""
    if not isinstance(data, dict) or not isinstance(data.get("objects"), list):
        raise JsonError("no object with a list of objects")
    objects = [_scored_object(item) for item in data["objects"]]
    facts = {name: data[name] for name in _FACTS if data.get(name) is not None}
    prediction = build_dataclass(Prediction, facts | {"objects": []})
    if prediction.status not in _STATUSES:
        raise JsonError(f"status {prediction.status!r} is none of {', '.join(_STATUSES)}")
    items, scores = tuple(item for item, _ in objects), tuple(score for _, score in objects)
    return replace(prediction, objects=items, scores=scores)


def _scored_object(data: Any) -> tuple[BBUObject, float | None]:
    if not isinstance(data, dict) or not isinstance(data.get("desc"), str):
        raise JsonError("an object lacks its 'bbox_2d' or a text 'desc'")
    score = data.get("score")
    if score is not None and not _is_number(score):
        raise JsonError(f"score {score!r} is no number")
    return BBUObject(_box(data.get("bbox_2d")), data["desc"]), score


def _box(numbers: Any) -> tuple[float, float, float, float]:
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise JsonError(f"box {numbers!r} is not four numbers")
    x1, y1, x2, y2 = (float(number) for number in numbers)
    # Matching would score an inverted box without a word.
    if not (x1 < x2 and y1 < y2 and all(abs(side) < _MAX_COORDINATE for side in (x1, y1, x2, y2))):
        raise JsonError(f"box {numbers!r} is empty, inverted or not in an image")
    return x1, y1, x2, y2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
