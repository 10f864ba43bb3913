"""Hungarian matching of a whole batch beside transformers' own, on the CPU, with the same assignments."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from bbu.config.read import load_config
from bbu.losses.matcher import HungarianMatcher

SIZES = ((8, 100, 8), (32, 300, 43))
"""(batch, queries, most targets of a sample)"""


def run() -> str:
    rows = [measure(*size) for size in SIZES]
    return tabulate(
        rows, headers=["batch", "queries", "targets", "ours ms", "transformers ms", "ratio"], floatfmt=".1f"
    )


def measure(batch: int, queries: int, targets: int) -> list[float]:
    torch.manual_seed(0)
    boxes, logits = torch.rand(1, batch, queries, 4) * 0.5, torch.randn(1, batch, queries)
    truth = [torch.rand(int(n), 4) * 0.5 for n in torch.randint(1, targets + 1, (batch,))]
    valid = torch.ones(batch, queries, dtype=torch.bool)
    labels = [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in truth]
    detection = dataclasses.replace(
        load_config("smoke").detection, detection_cost_bbox=5.0, detection_cost_giou=2.0, detection_cost_objectness=2.0
    )
    ours, theirs = HungarianMatcher(detection), DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
    outputs = {"logits": logits[0, ..., None], "pred_boxes": boxes[0]}
    matches, expected = ours(boxes, logits, valid, truth), theirs(outputs, labels)
    offsets = [sum(len(t) for t in truth[:b]) for b in range(batch)]
    pairs = {(int(s), int(q), int(t)) for s, q, t in zip(matches.sample, matches.query, matches.target, strict=True)}
    expected_pairs = {
        (b, int(q), offsets[b] + int(t))
        for b, (rows, columns) in enumerate(expected)
        for q, t in zip(rows, columns, strict=True)
    }
    assert pairs == expected_pairs, "the two matchers disagree"
    our_ms, their_ms = best_ms(lambda: ours(boxes, logits, valid, truth)), best_ms(lambda: theirs(outputs, labels))
    return [batch, queries, targets, our_ms, their_ms, their_ms / our_ms]


def best_ms(call: Callable[[], object], repeats: int = 15) -> float:
    """Milliseconds of the fastest call: slower ones shared the core with other programs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000
