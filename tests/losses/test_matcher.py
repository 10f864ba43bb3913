"""Matching: the assignment transformers' Deformable DETR would make, for all layers with one wait for the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from bbu.config.domains import DetectionConfig
from bbu.losses.matcher import HungarianMatcher, Matches
from tests.losses.conftest import Case, make_case


def match(detection: DetectionConfig, case: Case) -> Matches:
    return HungarianMatcher(detection)(case.boxes, case.logits, case.valid, case.targets)


def pairs(matches: Matches, layer: int, sample: int, offset: int) -> set[tuple[int, int]]:
    rows = (matches.layer == layer) & (matches.sample == sample)
    return set(zip(matches.query[rows].tolist(), (matches.target[rows] - offset).tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(8, 20), st.integers(0, 1000))
def test_every_layer_is_matched_as_transformers_would(detection, counts: list[int], queries: int, seed: int):
    case = make_case(counts, queries, seed=seed)
    matches = match(detection, case)
    theirs = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    labels = [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in case.targets]
    for layer in range(2):
        outputs = {"logits": case.logits[layer, ..., None], "pred_boxes": case.boxes[layer]}
        for sample, (rows, columns) in enumerate(theirs(outputs, labels)):
            expected = set(zip(rows.tolist(), columns.tolist(), strict=True))
            assert pairs(matches, layer, sample, sum(counts[:sample])) == expected


def test_padding_queries_are_never_matched(detection: DetectionConfig):
    case = make_case([4, 2])
    case.valid[0, :6] = False
    assert (match(detection, case).query[match(detection, case).sample == 0] >= 6).all()


def test_more_targets_than_queries_match_as_many_as_there_are(detection: DetectionConfig):
    case = make_case([7], queries=10)
    case.valid[0, 3:] = False
    matches = match(detection, case)
    assert (
        matches.last_layer.query.sort().values.tolist() == [0, 1, 2]
        and len(set(matches.last_layer.target.tolist())) == 3
    )


def test_without_targets_there_is_nothing_to_match(detection: DetectionConfig):
    assert len(match(detection, make_case([0, 0])).query) == 0


def test_a_cost_that_is_no_number_is_the_last_choice_and_does_not_stop_the_rank(detection: DetectionConfig):
    case = make_case([2])
    case.boxes.data[1, 0, :8] = float("nan")
    assert set(match(detection, case).last_layer.query.tolist()) <= {8, 9}


class CountSyncs(TorchDispatchMode):
    """Counts what makes a GPU's host wait: copies to the host and reads of single values."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_one_copy_to_the_host_for_all_layers_and_samples(detection: DetectionConfig, monkeypatch: pytest.MonkeyPatch):
    copies, stock = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or stock(tensor))
    with CountSyncs() as counted:
        match(detection, make_case([3, 0, 5], layers=4))
    assert (len(copies), counted.reads) == (1, 0)
