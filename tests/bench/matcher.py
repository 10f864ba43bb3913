"""Hungarian matching of a whole batch beside transformers' own, on the CPU, with the same assignments."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from bbu.config.read import load_config
from bbu.losses.matcher import HungarianMatcher
from tests.bench._results import Row

OUTPUTS = 7
"""Outputs of a head with six layers, each of which is matched."""
SIZES = ((8, 100, 8, "6x"), (8, 100, 43, "15x"), (32, 300, 43, "60x"))
"""(batch, queries, most targets of a sample, limit of the ratio)"""


def run() -> list[Row]:
    return [measure(*size) for size in SIZES]


def measure(batch: int, queries: int, targets: int, limit: str) -> Row:
    torch.manual_seed(0)
    boxes, logits = torch.rand(OUTPUTS, batch, queries, 4) * 0.5, torch.randn(OUTPUTS, batch, queries)
    truth = [torch.rand(int(n), 4) * 0.5 for n in torch.randint(1, targets + 1, (batch,))]
    valid = torch.ones(batch, queries, dtype=torch.bool)
    labels = [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in truth]
    detection = dataclasses.replace(
        load_config("smoke").detection, detection_cost_bbox=5.0, detection_cost_giou=2.0, detection_cost_objectness=2.0
    )
    ours, theirs = HungarianMatcher(detection), DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
    outputs = [{"logits": logits[i, ..., None], "pred_boxes": boxes[i]} for i in range(OUTPUTS)]
    matches, expected = ours(boxes, logits, valid, truth), [theirs(output, labels) for output in outputs]
    offsets = [sum(len(t) for t in truth[:b]) for b in range(batch)]
    fields = (matches.layer, matches.sample, matches.query, matches.target)
    pairs = set(zip(*(field.tolist() for field in fields), strict=True))
    expected_pairs = {
        (layer, b, int(q), offsets[b] + int(t))
        for layer, assignment in enumerate(expected)
        for b, (rows, columns) in enumerate(assignment)
        for q, t in zip(rows, columns, strict=True)
    }
    assert pairs == expected_pairs, "the two matchers disagree"
    our_ms = best_ms(lambda: ours(boxes, logits, valid, truth))
    their_ms = best_ms(lambda: [theirs(output, labels) for output in outputs])
    return Row(
        f"matching {OUTPUTS} outputs, {batch} samples x {queries} queries x up to {targets} targets",
        f"{our_ms:.1f} ms", f"transformers' Deformable DETR {their_ms:.1f} ms", their_ms / our_ms, limit,
    )  # fmt: skip


def best_ms(call: Callable[[], object], repeats: int = 15) -> float:
    """Milliseconds of the fastest call: slower ones shared the core with other programs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000
