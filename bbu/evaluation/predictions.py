"""The predictions file: what inference writes, one JSON line an image, and evaluation scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bbu.errors import DataError
from bbu.schema import BBUObject

STATUSES = ("ok", "repaired", "truncated", "unparsed", "failed")


@dataclass(frozen=True)
class Prediction:
    """Everything predicted for one image. Boxes in absolute pixels of the resized image (`width`, `height`);
    `scores` beside `objects`, None where there are none; `score_source` says what the scores are."""

    image: str
    objects: tuple[BBUObject, ...]
    scores: tuple[float | None, ...] = ()
    status: str = "ok"
    score_source: str | None = None
    width: int | None = None
    height: int | None = None
    rejected: dict[str, int] = field(default_factory=dict)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions JSONL file; raises DataError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the predictions first") from error
    return [_prediction(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _prediction(line: str, where: str) -> Prediction:
    try:
        data: dict[str, Any] = json.loads(line)
        objects = tuple(BBUObject(_box(o["bbox_2d"]), str(o["desc"])) for o in data["objects"])
        return Prediction(
            image=data["image"],
            objects=objects,
            scores=tuple(o.get("score") for o in data["objects"]),
            status=_status(data.get("status", "ok")),
            score_source=data.get("score_source"),
            width=data.get("width"),
            height=data.get("height"),
            rejected=dict(data.get("rejected") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: no prediction record ({error!r}); predict this image again") from error


def _box(numbers: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(n) for n in numbers)
    return x1, y1, x2, y2


def _status(status: str) -> str:
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
    return status
