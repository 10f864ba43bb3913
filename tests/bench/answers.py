"""Parsing whole and cut answers beside json.loads and json_repair, with the same objects."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from random import Random
from typing import Any

import json_repair

from bbu.inference.parse import parse_answer
from bbu.schema import BBUObject
from bbu.synthetic.distribution import KINDS, draw_room
from tests.bench._results import Row

ANSWERS = 300
WIDTH = HEIGHT = 10_000
BOUND = "half is checking and placing the objects; building them unchecked from what json.loads returns is the next row"


def run() -> list[Row]:
    random = Random(0)
    data = [draw_answer(random) for _ in range(ANSWERS)]
    whole = [json.dumps(objects, ensure_ascii=False) for objects in data]
    cut = [text[: random.randrange(len(text) // 2, len(text))] for text in whole]
    for objects, text in zip(data, whole, strict=True):
        assert list(parse_answer(text, finished=True).objects) == build_objects(objects)
    for objects, text in zip(data, cut, strict=True):
        complete = parse_answer(text, finished=False).objects
        assert list(complete) == build_objects(objects[: len(complete)])
    ours = best_us(lambda text: parse_answer(text, finished=True, width=WIDTH, height=HEIGHT), whole)
    ours_cut = best_us(lambda text: parse_answer(text, finished=False, width=WIDTH, height=HEIGHT), cut)
    peers = {
        "json.loads": (json.loads, "0.67x"),
        "json.loads and the objects": (lambda text: build_objects(json.loads(text)), ""),
        "json_repair": (json_repair.loads, ""),
    }
    rows = [make_row("whole", ours, name, best_us(call, whole), limit) for name, (call, limit) in peers.items()]
    return [*rows, make_row("cut", ours_cut, "json_repair", best_us(json_repair.loads, cut), "4.9x")]


def make_row(kind: str, ours: float, name: str, peer: float, limit: str) -> Row:
    ratio = peer / ours
    remark = BOUND if name == "json.loads" and ratio < 1 / 1.5 else ""
    return Row(f"{kind} answer, median 4 objects", f"{ours:.1f} µs", f"{name} {peer:.1f} µs", ratio, limit, remark)


def draw_answer(random: Random) -> list[dict[str, Any]]:
    """What a model writes of one photo, with the published counts of objects."""
    return [
        {"bbox_2d": [int(x1), int(y1), int(x2) + 1, int(y2) + 1], "desc": random.choice(KINDS).label_zh}
        for x1, y1, x2, y2 in (part.box for part in draw_room(random, "full").parts)
    ]


def build_objects(data: list[dict[str, Any]]) -> list[BBUObject]:
    """Build objects without checking anything."""
    objects = []
    for item in data:
        x1, y1, x2, y2 = item["bbox_2d"]
        objects.append(BBUObject((float(x1), float(y1), float(x2), float(y2)), item["desc"]))
    return objects


def best_us(call: Callable[[str], object], texts: list[str], repeats: int = 15) -> float:
    """CPU microseconds of a text in the fastest round over all texts."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for text in texts:
            call(text)
        times.append(time.process_time() - start)
    return min(times) / len(texts) * 1e6
