"""Matching: the assignment transformers' Deformable DETR would make, for all layers with one wait for the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from bbu.config.domains import DetectionConfig
from bbu.losses import matcher
from bbu.losses.matcher import HungarianMatcher, Matches
from tests.host_waits import host_waits
from tests.losses.conftest import Case, make_case


def match_case(detection: DetectionConfig, case: Case) -> Matches:
    return HungarianMatcher(detection)(case.boxes, case.logits, case.valid, case.targets)


def pairs(matches: Matches, layer: int, sample: int, offset: int) -> set[tuple[int, int]]:
    rows = (matches.layer == layer) & (matches.sample == sample)
    return set(zip(matches.query[rows].tolist(), (matches.target[rows] - offset).tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(8, 20), st.integers(0, 1000))
def test_every_layer_is_matched_as_transformers_would(detection, counts: list[int], queries: int, seed: int):
    case = make_case(counts, queries, seed=seed)
    matches = match_case(detection, case)
    theirs = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    labels = [{"class_labels": torch.zeros(len(t), dtype=torch.int64), "boxes": t} for t in case.targets]
    for layer in range(2):
        outputs = {"logits": case.logits[layer, ..., None], "pred_boxes": case.boxes[layer]}
        for sample, (rows, columns) in enumerate(theirs(outputs, labels)):
            expected = set(zip(rows.tolist(), columns.tolist(), strict=True))
            assert pairs(matches, layer, sample, sum(counts[:sample])) == expected


@pytest.mark.parametrize("pairs_at_once", [1, 300])
def test_in_whatever_parts_the_costs_are_computed_the_matches_are_the_same(
    detection: DetectionConfig, monkeypatch: pytest.MonkeyPatch, pairs_at_once: int
):
    case = make_case([0, 3, 5, 0, 8, 1, 0])
    case.valid[1, 2:] = False
    whole = match_case(detection, case)
    monkeypatch.setattr(matcher, "_PAIRS_IN_CACHE", pairs_at_once)
    parts = match_case(detection, case)
    for name in ("layer", "sample", "query", "target"):
        assert getattr(parts, name).tolist() == getattr(whole, name).tolist()


def test_padding_queries_are_never_matched(detection: DetectionConfig):
    case = make_case([4, 2])
    case.valid[0, :6] = False
    assert (match_case(detection, case).query[match_case(detection, case).sample == 0] >= 6).all()


def test_more_targets_than_queries_match_as_many_as_there_are(detection: DetectionConfig):
    case = make_case([7], queries=10)
    case.valid[0, 3:] = False
    matches = match_case(detection, case)
    assert (
        matches.last_layer.query.sort().values.tolist() == [0, 1, 2]
        and len(set(matches.last_layer.target.tolist())) == 3
    )


def test_without_targets_there_is_nothing_to_match(detection: DetectionConfig):
    assert len(match_case(detection, make_case([0, 0])).query) == 0


def test_the_last_layers_pairs_are_those_whose_layer_is_the_last(detection: DetectionConfig):
    case = make_case([3, 0, 5, 2], queries=6, layers=3)
    case.valid[2, 2:] = False  # fewer queries than targets
    matches = match_case(detection, case)
    in_last_layer, last = matches.layer == 2, matches.last_layer
    assert last.layer.tolist() == [2] * (3 + 2 + 2)
    for name in ("sample", "query", "target"):
        assert getattr(last, name).tolist() == getattr(matches, name)[in_last_layer].tolist()
    assert last.last_layer.query.tolist() == last.query.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_no_number_is_the_last_choice_and_does_not_stop_the_rank(
    detection: DetectionConfig, value: float
):
    case = make_case([2, 2])
    case.boxes.data[1, 0, :8] = value
    case.logits.data[1, 1, :8] = value
    assert set(match_case(detection, case).last_layer.query.tolist()) <= {8, 9}


def test_the_count_of_waits_sees_those_inside_autograd_and_indexing():
    pair = torch.rand(3, 2, requires_grad=True)
    assert host_waits(lambda: pair.prod(-1).sum().backward(), pair)
    assert host_waits(lambda: pair[pair[:, 0] > 0.5], pair)


def test_one_copy_to_the_host_for_all_layers_and_samples(detection: DetectionConfig):
    case = make_case([3, 0, 5], layers=4)
    waits = host_waits(lambda: match_case(detection, case).last_layer, vars(case))
    assert [wait.rpartition(": ")[2] for wait in waits] == ["cpu copies to the host"], waits
