"""Scores labels level by level, because metrics of the surface text call 连接正确 and 连接错误 nearly equal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from bbu.evaluation.detection import f_scores
from bbu.evaluation.metrics import defined_score
from bbu.labels import LEVELS, Label, LabelScheme, Level

_MISSED, _SPURIOUS, _ABSENT = "(missed)", "(spurious)", "(absent)"
"""No prediction matched the object; no object matched the prediction; the label does not have this level."""
_NO_CLASSES = {_MISSED, _SPURIOUS, _ABSENT}


def score_labels(matches: Sequence[tuple[str | None, str | None]], scheme: LabelScheme) -> dict[Level, dict[str, Any]]:
    """Score the labels of matched boxes on each level.

    Args:
        matches: (true, predicted) description of each match, as `detection.matched_descriptions` gives them.
        scheme: how descriptions are read.

    Returns:
        For each level `accuracy` over matched objects whose truth has the level (None when there are none),
        `support` (that number), `confusion` as {true: {predicted: count}}, and `per_class` with `support` (all
        true objects of the class, missed ones too), `predicted`, `correct`, `precision`, `recall`, `f1`; these three
        are None for a class without true objects, and the precision of one that is never predicted.
    """

    def parse(description: str | None) -> Label | None:
        return None if description is None else scheme.parse_description(description)

    labels = Counter[tuple[Label | None, Label | None]]()
    for (true, predicted), count in Counter(matches).items():
        labels[parse(true), parse(predicted)] += count
    return {level: _score_level(labels, level) for level in LEVELS}


def _score_level(labels: Counter[tuple[Label | None, Label | None]], level: Level) -> dict[str, Any]:
    cells = Counter[tuple[str, str]]()
    for (true, said), count in labels.items():
        cells[_class(true, level, _SPURIOUS), _class(said, level, _MISSED)] += count
    # Without a class on either side the pair says nothing about this level.
    cells = Counter({cell: n for cell, n in cells.items() if not set(cell) <= _NO_CLASSES})
    compared = {c: n for c, n in cells.items() if c[0] not in (_SPURIOUS, _ABSENT) and c[1] != _MISSED}
    support = sum(compared.values())
    correct = sum(n for (true, said), n in compared.items() if true == said)
    return {
        "accuracy": correct / support if support else None,
        "support": support,
        "confusion": _nested(cells),
        "per_class": _per_class(cells),
    }


def _class(label: Label | None, level: Level, otherwise: str) -> str:
    return otherwise if label is None else label.text_of(level) or _ABSENT


def _nested(cells: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for (true, said), count in sorted(cells.items()):
        rows[true][said] = count
    return dict(rows)


def _per_class(cells: Counter[tuple[str, str]]) -> dict[str, dict[str, float | None]]:
    true, said = Counter[str](), Counter[str]()
    for (t, s), count in cells.items():
        true[t] += count
        said[s] += count
    names = sorted((set(true) | set(said)) - _NO_CLASSES)
    return {name: _class_row(cells[name, name], said[name], true[name]) for name in names}


def _class_row(correct: int, predicted: int, support: int) -> dict[str, float | None]:
    precision, recall, f1 = (defined_score(value) for value in f_scores(correct, predicted, support))
    counts: dict[str, float | None] = {"support": support, "predicted": predicted, "correct": correct}
    return counts | {"precision": precision, "recall": recall, "f1": f1}
