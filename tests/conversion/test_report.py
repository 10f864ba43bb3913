"""The limits above which a conversion refuses its input."""

from __future__ import annotations

import dataclasses

import pytest

from bbu.config.read import load_config
from bbu.conversion.report import check_rejects, summarise
from bbu.errors import DataError

OBJECT = {"bbox_2d": [0, 0, 1, 1], "desc": "标签贴纸"}


def outcome(kept: int, *reasons: str) -> dict:
    rejects = [{"photo": "p", "index": i, "reason": reason, "detail": ""} for i, reason in enumerate(reasons)]
    facts = {"dialect": "A", "frame": "upright", "clipped": 0}
    return {"name": "p", "view": {"images": ["p"], "objects": [OBJECT] * kept}, "rejects": rejects} | facts


def check(*outcomes: dict, **changes: object) -> None:
    config = dataclasses.replace(load_config("smoke").data, **({"max_reject_share": 0.25} | changes))
    check_rejects(summarise(outcomes, config), config)


def test_share_at_the_limit_passes_and_above_it_refuses() -> None:
    check(outcome(3, "mostly_outside"))
    with pytest.raises(DataError, match="2 of 5 objects rejected"):
        check(outcome(3, "mostly_outside", "empty_box"))


def test_duplicates_and_filtered_labels_are_no_defects() -> None:
    check(outcome(1, "duplicate", "duplicate", "unknown_property"))


def test_labels_outside_the_hierarchy_refuse_where_the_config_says_so() -> None:
    with pytest.raises(DataError, match="1 objects have labels outside"):
        check(outcome(9, "unknown_object_type"), unknown_label_policy="refuse")


def test_photo_without_any_object_counts_as_a_negative() -> None:
    config = load_config("smoke").data
    assert summarise([outcome(0), outcome(2)], config)["photos"]["negatives"] == 1
