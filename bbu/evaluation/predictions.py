"""The predictions file: what inference writes, one JSON line an image, and evaluation scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bbu.errors import DataError
from bbu.schema import BBUObject

_STATUSES = ("ok", "repaired", "truncated", "unparsed", "failed")


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
    rejected: dict[str, int] = field(default_factory=dict)
    """parts of the answer that were rejected: how many for which reason"""


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions JSONL file; raises DataError naming file and line."""
    try:
        # Not splitlines(): a generated text may hold U+2028 and its like, which are no ends of a JSON line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run the predictions again") from error
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
    facts = {k: getattr(prediction, k) for k in ("image", "status", "score_source", "width", "height", "rejected")}
    return json.dumps(facts | {"objects": objects}, ensure_ascii=False, allow_nan=False) + "\n"


def drop_cut_line(path: Path) -> None:
    """Cut off a last line that has no newline: its writer was killed while it wrote."""
    data = path.read_bytes() if path.exists() else b""
    size_of_lines = data.rfind(b"\n") + 1
    if size_of_lines < len(data):
        with path.open("rb+") as file:
            file.truncate(size_of_lines)


def _prediction(line: str, where: str) -> Prediction:
    try:
        data: dict[str, Any] = json.loads(line)
        objects = tuple(BBUObject(_box(o["bbox_2d"]), str(o["desc"])) for o in data["objects"])
        return Prediction(
            image=data["image"],
            objects=objects,
            scores=tuple(_score(o.get("score")) for o in data["objects"]),
            status=_status(data.get("status", "ok")),
            score_source=data.get("score_source"),
            width=data.get("width"),
            height=data.get("height"),
            rejected=dict(data.get("rejected") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{where}: no prediction record ({error!r}); predict this image again") from error


def _box(numbers: Any) -> tuple[float, float, float, float]:
    if not isinstance(numbers, list) or len(numbers) != 4:
        raise ValueError(f"box {numbers!r} is not four numbers")
    x1, y1, x2, y2 = (float(n) for n in numbers)
    # Written so that NaN fails too: pycocotools would score such boxes without a word.
    if not (-math.inf < x1 < x2 < math.inf and -math.inf < y1 < y2 < math.inf):
        raise ValueError(f"box {numbers!r} is empty, inverted or not finite")
    return x1, y1, x2, y2


def _score(score: Any) -> float | None:
    if score is not None and not math.isfinite(score):
        raise ValueError(f"score {score!r} is not finite")
    return score


def _status(status: str) -> str:
    if status not in _STATUSES:
        raise ValueError(f"status {status!r} is none of {', '.join(_STATUSES)}")
    return status
