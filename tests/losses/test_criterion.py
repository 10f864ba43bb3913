"""Detection losses: those of transformers' Deformable DETR, sums that add up, and nothing that leaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from bbu.config.domains import DetectionConfig
from bbu.losses.criterion import DetectionSums, SetCriterion, _focal_loss, caption_sums, denoising_sums
from bbu.losses.matcher import HungarianMatcher
from tests.host_waits import host_waits
from tests.losses.conftest import Case, make_case

NAMES = {"loss_ce": "objectness_loss", "loss_bbox": "bbox_l1_loss", "loss_giou": "bbox_giou_loss"}


def detection_sums(detection: DetectionConfig, case: Case) -> DetectionSums:
    matches = HungarianMatcher(detection)(case.boxes, case.logits, case.valid, case.targets)
    return SetCriterion(detection)(case.boxes, case.logits, case.valid, case.targets, matches)


@pytest.mark.parametrize("counts", [[3, 5], [0, 4], [1], [0, 0]])
def test_losses_are_those_of_transformers(detection: DetectionConfig, counts: list[int]):
    case = make_case(counts)
    ours = detection_sums(detection, case)
    matcher = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    theirs = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    labels = [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in case.targets]
    for layer, suffix in ((0, "_aux0"), (1, "")):
        their_losses = theirs({"logits": case.logits[layer, ..., None], "pred_boxes": case.boxes[layer]}, labels)
        for their_name, our_name in NAMES.items():
            expected = their_losses[their_name].item() * max(sum(counts), 1)
            assert ours.sums[our_name + suffix].item() == pytest.approx(expected, rel=1e-5, abs=1e-6), our_name + suffix
    assert ours.boxes == sum(counts)


def test_halves_of_a_batch_add_up_to_the_whole_losses_and_gradients(detection: DetectionConfig):
    whole = make_case([3, 0, 2, 4])
    total = detection_sums(detection, whole)
    sum(total.sums.values()).backward()
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = Case(
            whole.boxes.detach()[:, rows].clone().requires_grad_(),
            whole.logits.detach()[:, rows].clone().requires_grad_(),
            whole.valid[rows],
            whole.targets[rows],
        )
        parts.append((part, detection_sums(detection, part)))
        sum(parts[-1][1].sums.values()).backward()
    for name, value in total.sums.items():
        assert value.item() == pytest.approx(sum(p.sums[name].item() for _, p in parts), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(torch.cat([p.boxes.grad for p, _ in parts], dim=1), whole.boxes.grad)
    torch.testing.assert_close(torch.cat([p.logits.grad for p, _ in parts], dim=1), whole.logits.grad)


def test_without_any_object_every_output_still_has_a_gradient(detection: DetectionConfig):
    case = make_case([0, 0])
    total = sum(detection_sums(detection, case).sums.values())
    total.backward()
    assert case.boxes.grad is not None and not case.boxes.grad.any()
    assert case.logits.grad is not None and case.logits.grad.all()


def test_padding_queries_change_no_bit(detection: DetectionConfig):
    case, other = make_case([3, 2]), make_case([3, 2])
    for changed in (case, other):
        changed.valid[:, 7:] = False
    other.logits.data[:, :, 7:] = 50.0
    other.boxes.data[:, :, 7:] = 0.5
    one, two = detection_sums(detection, case), detection_sums(detection, other)
    assert all(torch.equal(one.sums[name], two.sums[name]) for name in one.sums)


def test_not_even_a_nan_of_a_padding_query_reaches_losses_or_gradients(detection: DetectionConfig):
    case, other = make_case([3, 2]), make_case([3, 2])
    for changed in (case, other):
        changed.valid[:, 7:] = False
    other.logits.data[:, :, 7:] = other.boxes.data[:, :, 7:] = float("nan")
    for one, two in zip(losses_and_gradients(detection, case), losses_and_gradients(detection, other), strict=True):
        assert torch.equal(one, two)


def losses_and_gradients(detection: DetectionConfig, case: Case) -> list[torch.Tensor]:
    """Losses and gradients, with every query taken for a denoising one too."""
    targets, positive = torch.full((*case.valid.shape, 4), 0.3), torch.arange(case.valid.shape[1]) % 2 == 0
    matched = detection_sums(detection, case).sums
    denoised = denoising_sums(
        case.boxes, case.logits, targets, positive.expand_as(case.valid), case.valid, alpha=0.25, gamma=2.0
    )
    values = [*matched.values(), *denoised.values()]
    return [*values, *torch.autograd.grad(sum(values), [case.boxes, case.logits])]


@pytest.mark.parametrize("broken", ["boxes", "logits"])
def test_a_nan_of_any_real_query_reaches_the_loss_matched_or_not(detection: DetectionConfig, broken: str):
    case = make_case([1])
    getattr(case, broken).data[:, 0, :5] = float("nan")
    assert sum(detection_sums(detection, case).sums.values()).isnan()


def test_neither_losses_nor_gradients_wait_for_the_device(detection: DetectionConfig):
    case = make_case([3, 0, 4])
    matches = HungarianMatcher(detection)(case.boxes, case.logits, case.valid, case.targets)

    def step() -> None:
        losses = SetCriterion(detection)(case.boxes, case.logits, case.valid, case.targets, matches)
        sum(losses.sums.values()).backward()

    assert host_waits(step, vars(case), vars(matches)) == []


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_has_a_gradient_where_the_answer_is_quite_sure(gamma: float):
    logits = torch.tensor([-40.0, 40.0, -200.0, 200.0], requires_grad=True)
    is_object, valid = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.ones(4, dtype=torch.bool)
    loss = _focal_loss(logits, is_object, valid, 0.25, gamma)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 0.25 * 200, 0.75 * 200]))
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.0, -0.25, 0.75]))


def test_captions_without_a_clue_cost_log_of_the_vocabulary():
    captions = torch.tensor([[4, 2, -100], [1, 9, 0]])
    total, count = caption_sums(torch.zeros(2, 3, 11), nn.Identity(), captions)
    assert count == 5 and total.item() == pytest.approx(5 * math.log(11))


def test_captions_without_a_token_cost_nothing_and_still_have_a_graph():
    logits = torch.randn(2, 3, 11, requires_grad=True)
    total, count = caption_sums(logits, nn.Identity(), torch.full((2, 3), -100))
    total.backward()
    assert (total.item(), count.item()) == (0, 0) and logits.grad is not None and not logits.grad.any()


def test_captions_count_no_token_after_the_end():
    captions = torch.tensor([[4, 2, -100, -100]])
    logits = torch.randn(1, 4, 11)
    changed = logits.clone()
    changed[:, 2:] = 99.0
    one, other = (caption_sums(states, nn.Identity(), captions)[0] for states in (logits, changed))
    assert torch.equal(one, other)


def test_captions_in_chunks_give_the_same_loss_and_gradients():
    captions = torch.tensor([[4, 2, -100], [1, 9, 0]])
    results = []
    for chunk_size in (0, 4):
        torch.manual_seed(0)
        states, head = torch.randn(2, 3, 8, requires_grad=True), nn.Linear(8, 11, bias=False)
        total, count = caption_sums(states, head, captions, chunk_size=chunk_size)
        total.backward()
        results.append([total.detach(), count, states.grad, head.weight.grad])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_denoising_scores_positives_as_objects_and_negatives_as_none():
    targets = torch.rand(1, 4, 4) * 0.4 + 0.2
    positive, valid = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])
    right = torch.where(positive, 20.0, -20.0)[None]
    perfect = denoising_sums(targets[None], right, targets, positive, valid, alpha=0.25, gamma=2.0)
    assert set(perfect) == {f"{name}_aux_dn0" for name in NAMES.values()}
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in perfect.values())
    wrong = denoising_sums(targets[None] + 0.1, -right, targets, positive, valid, alpha=0.25, gamma=2.0)
    assert wrong["bbox_l1_loss_aux_dn0"].item() == pytest.approx(0.4, rel=1e-4)  # one valid positive, four coordinates
    assert wrong["objectness_loss_aux_dn0"].item() == pytest.approx(20 * (0.25 + 0.75), rel=1e-3)
