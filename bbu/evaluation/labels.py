"""Labels scored level by level, because surface text metrics call 连接正确 and 连接错误 nearly equal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from bbu.evaluation.detection import f_scores

LEVELS = ("type", "property", "status")
MISSED, SPURIOUS, ABSENT = "(missed)", "(spurious)", "(absent)"
"""No prediction matched the object; no object matched the prediction; the description lacks this level."""


def score_labels(matches: Sequence[tuple[str | None, str | None]]) -> dict[str, dict[str, Any]]:
    """Score the labels of matched boxes (`detection.matched_pairs`) on each of LEVELS.

    Per level: `accuracy` over matched objects whose truth has the level (None when there are none), `support`
    (that number), `confusion` as {true: {predicted: count}}, and `per_class` with `support` (all true objects
    of the class, missed ones too), `predicted`, `correct`, `precision`, `recall`, `f1`.
    """
    return {level: _score_level(matches, index) for index, level in enumerate(LEVELS)}


def _score_level(matches: Sequence[tuple[str | None, str | None]], index: int) -> dict[str, Any]:
    cells = Counter((_level(true, index, SPURIOUS), _level(said, index, MISSED)) for true, said in matches)
    cells = Counter({cell: n for cell, n in cells.items() if _says_something(cell)})
    compared = {c: n for c, n in cells.items() if c[0] not in (SPURIOUS, ABSENT) and c[1] != MISSED}
    support = sum(compared.values())
    correct = sum(n for (true, said), n in compared.items() if true == said)
    return {
        "accuracy": correct / support if support else None,
        "support": support,
        "confusion": _nested(cells),
        "per_class": _per_class(cells),
    }


def _level(desc: str | None, index: int, otherwise: str) -> str:
    if desc is None:
        return otherwise
    levels = [level.strip() for level in desc.split("/")]
    return levels[index] if index < len(levels) and levels[index] else ABSENT


def _says_something(cell: tuple[str, str]) -> bool:
    """False where neither side names a label on this level."""
    return not set(cell) <= {MISSED, SPURIOUS, ABSENT}


def _nested(cells: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for (true, said), count in sorted(cells.items()):
        rows[true][said] = count
    return dict(rows)


def _per_class(cells: Counter[tuple[str, str]]) -> dict[str, dict[str, float]]:
    true, said = Counter[str](), Counter[str]()
    for (t, s), count in cells.items():
        true[t] += count
        said[s] += count
    names = sorted((set(true) | set(said)) - {MISSED, SPURIOUS, ABSENT})
    return {name: _class_row(cells[name, name], said[name], true[name]) for name in names}


def _class_row(correct: int, predicted: int, support: int) -> dict[str, float]:
    precision, recall, f1 = (float(v) for v in f_scores(correct, predicted, support))
    counts = {"support": support, "predicted": predicted, "correct": correct}
    return counts | {"precision": precision, "recall": recall, "f1": f1}
