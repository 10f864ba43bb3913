"""The limits above which a conversion refuses its input."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.drop import FrameChoice
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome, outcome_to_dict, parse_outcome
from bbu.conversion.rejects import Reject
from bbu.conversion.report import (
    ConversionReport,
    FileCounts,
    check_report,
    count_outcomes,
    dump_rejects,
    dump_report,
    find_warnings,
    is_in_records,
)
from bbu.errors import DataError
from bbu.schema import BBUObject, View

OBJECT = BBUObject((0, 0, 1, 1), "标签贴纸")
NO_CHOICE, NO_FILES = FrameChoice(0, None, 0, 0, ()), FileCounts({}, {})


def converted(objects: int, **changes: object) -> ConvertedPhoto:
    facts = {"sha256": "0" * 64, "dialect": "A", "frame": "upright", "decides_frame": False, "clipped": 0}
    facts |= {"may_be_percent": False, "reach": 1.0}
    return ConvertedPhoto(View(("p",), (OBJECT,) * objects, 28, 28), **({"respelled": ()} | facts | changes))


def outcome(objects: int, *reasons: str, **changes: object) -> PhotoOutcome:
    """A converted photo with some objects, and others that were rejected for reasons."""
    rejects = tuple(Reject("p", reason, f"detail of {reason}", i) for i, reason in enumerate(reasons))
    return PhotoOutcome("p", converted(objects, **changes), rejects)


def config(**changes: object) -> DataConfig:
    return dataclasses.replace(load_config("smoke").data, **({"max_reject_share": 0.25} | changes))


def report(*outcomes: PhotoOutcome, **changes: object) -> ConversionReport:
    counts = count_outcomes(outcomes, config(**changes))
    return ConversionReport(*counts, NO_FILES, NO_CHOICE, written={"train.jsonl": 1}, val_sites=["S1"], warnings=[])


def check(*outcomes: PhotoOutcome, **changes: object) -> None:
    check_report(report(*outcomes, **changes), config(**changes))


def test_share_at_the_limit_passes_and_above_it_refuses() -> None:
    check(outcome(3, "mostly_outside"))
    with pytest.raises(DataError, match="2 of 5 objects rejected"):
        check(outcome(3, "mostly_outside", "empty_box"))


def test_duplicates_are_no_defects() -> None:
    check(outcome(1, "duplicate", "duplicate"))


def test_labels_outside_the_hierarchy_are_defects_and_the_message_names_files_and_labels() -> None:
    check(outcome(3, "unknown_property"))
    with pytest.raises(
        DataError, match=r"2 of 4 objects .*hierarchy_zh: detail of unknown_property \(2\).*token_map_zh"
    ):
        check(outcome(2, "unknown_property", "unknown_property"))


def test_labels_that_the_config_ignores_are_counted_apart_and_no_rejects() -> None:
    one = outcome(1, "unknown_property", "unknown_object_type", "empty_box")
    ignoring = config(unknown_label_policy="ignore")
    counts = report(one, unknown_label_policy="ignore").objects
    assert (counts.ignored, counts.rejected) == (2, {"empty_box": 1})
    assert [json.loads(line)["reason"] for line in dump_rejects([one], ignoring).splitlines()] == ["empty_box"]
    check(outcome(1, "unknown_property", "unknown_object_type"), unknown_label_policy="ignore")
    assert "2 objects with unknown labels are ignored" in "".join(
        find_warnings(report(one, unknown_label_policy="ignore"), ignoring)
    )


def test_labels_outside_the_hierarchy_refuse_where_the_config_says_so() -> None:
    with pytest.raises(DataError, match="1 objects have labels outside"):
        check(outcome(9, "unknown_object_type"), unknown_label_policy="refuse")


REJECTED = PhotoOutcome("q", None, (Reject("q", "broken_json", ""),))
UNKNOWN = ("unknown_object_type",) * 115


@pytest.mark.parametrize(
    ("outcomes", "policy", "message"),
    [
        ([outcome(0, *UNKNOWN)], "drop", r"0 of 115 objects kept.*hierarchy_zh: detail of unknown_object_type \(115\)"),
        ([outcome(1, *UNKNOWN)], "drop", "1 of 116 objects kept"),
        ([outcome(0, *UNKNOWN)], "ignore", "0 of 115 objects kept.*ignored 115"),
        ([outcome(0, "empty_box")], "drop", "0 of 1 objects kept"),
        ([outcome(0, "missing_label")], "drop", "0 of 1 objects kept.*is language zh the one"),
        ([outcome(0), outcome(0)], "drop", "no photo .* shows any object"),
        ([REJECTED], "drop", "0 of 1 photos can be used"),
        ([outcome(3), *[REJECTED] * 99], "drop", "1 of 100 photos can be used.*broken_json"),
    ],
)
def test_a_conversion_that_keeps_hardly_any_object_is_refused_whatever_the_share(outcomes, policy, message) -> None:
    with pytest.raises(DataError, match=message):
        check(*outcomes, max_reject_share=1.0, unknown_label_policy=policy)


def test_few_objects_are_enough_where_the_others_are_ignored_on_purpose() -> None:
    check(outcome(1, *UNKNOWN), unknown_label_policy="ignore")
    check(outcome(2, *UNKNOWN), max_reject_share=1.0)
    check(outcome(1), *[REJECTED] * 98, max_reject_share=1.0)


EMPTIED = outcome(0, "empty_box")


def test_a_photo_that_lost_all_its_objects_is_no_negative() -> None:
    photos = report(outcome(0), outcome(2), EMPTIED, outcome(0, "unknown_property")).photos
    assert (photos.negatives, photos.emptied, photos.emptied_policy) == (1, 2, "set_aside")


@pytest.mark.parametrize(
    ("each", "changes", "expected"),
    [
        (outcome(1, "empty_box"), {}, True),
        (outcome(0), {}, True),
        (outcome(0), {"keep_negatives": False}, False),
        (EMPTIED, {}, False),
        (EMPTIED, {"emptied_photo_policy": "negative"}, True),
        (EMPTIED, {"emptied_photo_policy": "negative", "keep_negatives": False}, False),
        (outcome(0, "unknown_property"), {"unknown_label_policy": "ignore"}, True),
        (REJECTED, {}, False),
    ],
)
def test_emptied_photos_are_set_aside_and_negatives_are_kept_unless_the_config_says_else(
    each, changes, expected
) -> None:
    assert is_in_records(each, config(**changes)) == expected


def test_what_somebody_should_look_at_is_a_warning() -> None:
    (emptied, respelled) = find_warnings(report(EMPTIED, outcome(1, respelled=("连接点(螺丝)",))), config())
    assert "1 photos lost all their objects" in emptied and "set aside" in emptied
    assert "brackets" in respelled and "连接点(螺丝) (1)" in respelled
    assert not find_warnings(report(outcome(1)), config())


def test_the_file_has_the_fields_that_it_always_had() -> None:
    data = json.loads(dump_report(report(outcome(1))))
    assert {key: sorted(value) for key, value in data.items() if key in ("photos", "objects", "exif")} == {
        "photos": [
            "dialects", "emptied", "emptied_policy", "frames", "negatives", "negatives_kept", "rejected", "seen"
        ],
        "objects": ["clipped", "ignored", "kept", "labels", "rejected", "respelled", "unknown_labels"],
        "exif": ["examples", "frame", "stored_photos", "undecided", "upright_photos"],
    }  # fmt: skip
    assert data["written"] == {"train.jsonl": 1} and data["val_sites"] == ["S1"] and data["warnings"] == []


@pytest.mark.parametrize(
    "each",
    [
        outcome(2, "empty_box", respelled=("a",)),
        dataclasses.replace(outcome(1), stored=outcome(1, "duplicate", frame="stored")),
        PhotoOutcome("q", None, (Reject("q", "broken_json", "a\u2028b"),)),
    ],
)
def test_an_outcome_survives_its_shard(each: PhotoOutcome) -> None:
    assert parse_outcome(json.loads(json.dumps(outcome_to_dict(each)))) == each
