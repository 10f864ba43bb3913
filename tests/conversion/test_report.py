"""The limits above which a conversion refuses its input."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bbu.config.read import load_config
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome, dump_outcome, parse_outcome
from bbu.conversion.report import ConversionReport, check_rejects, count_outcomes, dump_report
from bbu.conversion.vendor import Reject
from bbu.errors import DataError
from bbu.schema import BBUObject, View

OBJECT = BBUObject((0, 0, 1, 1), "标签贴纸")


def outcome(objects: int, *reasons: str) -> PhotoOutcome:
    """A converted photo with some objects, and others that were rejected for reasons."""
    rejects = tuple(Reject("p", reason, "", i) for i, reason in enumerate(reasons))
    view = View(("p",), (OBJECT,) * objects)
    return PhotoOutcome("p", ConvertedPhoto(view, "0" * 64, dialect="A", frame="upright", clipped=0), rejects)


def check(*outcomes: PhotoOutcome, **changes: object) -> None:
    config = dataclasses.replace(load_config("smoke").data, **({"max_reject_share": 0.25} | changes))
    check_rejects(ConversionReport(*count_outcomes(outcomes, config), written={}, val_sites=[]), config)


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
    photos, _ = count_outcomes([outcome(0), outcome(2)], config)
    assert photos.negatives == 1


def test_the_file_has_the_fields_that_it_always_had() -> None:
    config = load_config("smoke").data
    report = ConversionReport(*count_outcomes([outcome(1)], config), written={"train.jsonl": 1}, val_sites=["S1"])
    data = json.loads(dump_report(report))
    assert {key: sorted(value) for key, value in data.items() if key in ("photos", "objects")} == {
        "photos": ["dialects", "frames", "negatives", "negatives_kept", "rejected", "seen"],
        "objects": ["clipped", "kept", "labels", "rejected"],
    }
    assert data["written"] == {"train.jsonl": 1} and data["val_sites"] == ["S1"]


@pytest.mark.parametrize(
    "each", [outcome(2, "empty_box"), PhotoOutcome("q", None, (Reject("q", "broken_json", "a\u2028b"),))]
)
def test_an_outcome_survives_its_shard(each: PhotoOutcome) -> None:
    assert parse_outcome(dump_outcome(each)) == each
