"""Hungarian matching and losses of a whole batch beside transformers' own, on the CPU: equal matches and gradients."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from bbu.config.read import load_config
from bbu.losses.criterion import SetCriterion
from bbu.losses.matcher import HungarianMatcher, _assign_targets
from tests.bench._results import Row

OUTPUTS = 7
"""Outputs of a head with six layers, each of which is matched."""
SIZES = ((8, 100, 8, "6x"), (8, 100, 43, "15x"), (32, 300, 43, "60x"))
"""(batch, queries, most targets of a sample, limit of the ratio)"""


DETECTION = dataclasses.replace(
    load_config("smoke").detection, detection_cost_bbox=5.0, detection_cost_giou=2.0, detection_cost_objectness=2.0,
    detection_focal_alpha=0.25, detection_focal_gamma=2.0,
)  # fmt: skip


@dataclasses.dataclass
class Case:
    """What a head predicts for a batch and what is true, in our form and in transformers'."""

    boxes: torch.Tensor
    logits: torch.Tensor
    valid: torch.Tensor
    truth: list[torch.Tensor]

    @property
    def outputs(self) -> list[dict[str, torch.Tensor]]:
        return [{"logits": self.logits[i, ..., None], "pred_boxes": self.boxes[i]} for i in range(OUTPUTS)]

    @property
    def labels(self) -> list[dict[str, torch.Tensor]]:
        return [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in self.truth]


def run() -> list[Row]:
    rows = []
    for batch, queries, targets, limit in SIZES:
        size = f"{OUTPUTS} outputs, {batch} samples x {queries} queries x up to {targets} targets"
        case = draw_case(batch, queries, targets)
        rows += [measure_matching(case, size, limit), measure_losses(case, size, limit)]
    return rows


def draw_case(batch: int, queries: int, targets: int) -> Case:
    torch.manual_seed(0)
    boxes, logits = torch.rand(OUTPUTS, batch, queries, 4) * 0.5, torch.randn(OUTPUTS, batch, queries)
    truth = [torch.rand(int(n), 4) * 0.5 for n in torch.randint(1, targets + 1, (batch,))]
    return Case(boxes.requires_grad_(), logits.requires_grad_(), torch.ones(batch, queries, dtype=torch.bool), truth)


def measure_matching(case: Case, size: str, limit: str) -> Row:
    ours, theirs = HungarianMatcher(DETECTION), DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
    matches = ours(case.boxes, case.logits, case.valid, case.truth)
    offsets = [sum(len(t) for t in case.truth[:b]) for b in range(len(case.truth))]
    fields = (matches.layer, matches.sample, matches.query, matches.target)
    pairs = set(zip(*(field.tolist() for field in fields), strict=True))
    expected_pairs = {
        (layer, b, int(q), offsets[b] + int(t))
        for layer, output in enumerate(case.outputs)
        for b, (rows, columns) in enumerate(theirs(output, case.labels))
        for q, t in zip(rows, columns, strict=True)
    }
    assert pairs == expected_pairs, "the two matchers disagree"
    our_ms = best_ms(lambda: ours(case.boxes, case.logits, case.valid, case.truth))
    their_ms = best_ms(lambda: [theirs(output, case.labels) for output in case.outputs])
    costs = ours._costs(case.boxes, case.logits, case.valid, case.truth).detach().double().numpy()
    assignment_ms = best_ms(lambda: _assign_targets(costs, [len(t) for t in case.truth]))
    return make_row(f"matching, {size}", our_ms, their_ms, limit, f"{assignment_ms:.1f} ms are scipy's assignment")


def measure_losses(case: Case, size: str, limit: str) -> Row:
    ours, criterion = HungarianMatcher(DETECTION), SetCriterion(DETECTION)
    theirs = DeformableDetrImageLoss(
        DeformableDetrHungarianMatcher(2.0, 5.0, 2.0), num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"]
    )

    def our_loss() -> torch.Tensor:
        matches = ours(case.boxes, case.logits, case.valid, case.truth)
        sums = criterion(case.boxes, case.logits, case.valid, case.truth, matches)
        return torch.stack(list(sums.sums.values())).sum() / sums.boxes

    def their_loss() -> torch.Tensor:
        *auxiliary, last = case.outputs
        return torch.stack(list(theirs(last | {"auxiliary_outputs": auxiliary}, case.labels).values())).sum()

    torch.testing.assert_close(gradients(case, our_loss), gradients(case, their_loss))
    our_ms, their_ms = best_ms(lambda: gradients(case, our_loss)), best_ms(lambda: gradients(case, their_loss))
    matching_ms = best_ms(lambda: ours(case.boxes, case.logits, case.valid, case.truth))
    what = f"matching and losses, forward and backward, {size}"
    return make_row(what, our_ms, their_ms, limit, f"{matching_ms:.1f} ms are matching")


def make_row(what: str, our_ms: float, their_ms: float, limit: str, remark: str) -> Row:
    ratio = their_ms / our_ms
    short = ratio < float(limit.removesuffix("x"))
    peer = f"transformers' Deformable DETR {their_ms:.1f} ms"
    return Row(what, f"{our_ms:.1f} ms", peer, ratio, limit, remark if short else "")


def gradients(case: Case, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The loss, and its gradients by boxes and logits."""
    value = loss()
    return value.detach(), *torch.autograd.grad(value, (case.boxes, case.logits))


def best_ms(call: Callable[[], object], repeats: int = 15) -> float:
    """Milliseconds of the fastest call: slower ones shared the core with other programs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000
