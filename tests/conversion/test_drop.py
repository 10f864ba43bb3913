"""What only all photos of a drop say together."""

from __future__ import annotations

import dataclasses

import pytest

from bbu.conversion.drop import check_scale, choose_frames, frame_warnings, scale_warnings
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome
from bbu.errors import DataError
from bbu.schema import BBUObject, View

OBJECT = BBUObject((0, 0, 1, 1), "标签贴纸")


def outcome(
    frame: str = "upright", decides: bool = False, percent: bool = False, reach: float = 1.0, objects: int = 1
) -> PhotoOutcome:
    view = View(("p",), (OBJECT,) * objects, 28, 28)
    return PhotoOutcome("p", ConvertedPhoto(view, "0" * 64, "A", frame, decides, percent, reach, 0, ()), ())


UNDECIDED = dataclasses.replace(outcome("upright"), stored=outcome("stored"))
UPRIGHT, STORED, SWAPPED = (outcome(frame, decides=True) for frame in ("upright", "stored", "swapped"))
NOT_TURNED = outcome("upright")


@pytest.mark.parametrize(
    ("others", "frame", "words"),
    [
        ([], "upright", "set exif_frame"),
        ([NOT_TURNED], "upright", "set exif_frame"),
        ([UPRIGHT, SWAPPED], "upright", "as the 2 other photos that EXIF turns"),
        ([STORED], "stored", "as the 1 other photos that EXIF turns"),
        ([STORED, STORED, UPRIGHT], "upright", "1 are upright and 2 as stored"),
    ],
)
def test_the_photos_that_decide_their_frame_decide_it_for_the_others_where_they_agree(others, frame, words) -> None:
    chosen, choice = choose_frames([UNDECIDED, *others])
    assert chosen[0].photo and chosen[0].photo.frame == choice.frame == frame and chosen[1:] == others
    (warning,) = frame_warnings(choice)
    assert "1 photos (p): EXIF orientation" in warning and words in warning


def test_without_an_undecided_photo_there_is_nothing_to_say() -> None:
    chosen, choice = choose_frames([UPRIGHT, STORED])
    assert chosen == [UPRIGHT, STORED] and choice.frame is None and not frame_warnings(choice)


def numbered(*outcomes: PhotoOutcome) -> list[PhotoOutcome]:
    """The same under distinct names."""
    return [dataclasses.replace(each, name=f"p{i}") for i, each in enumerate(outcomes)]


PERCENT, PIXELS, NEAR = outcome(percent=True), outcome(), outcome(reach=0.3)


def test_photos_that_may_be_percent_are_named() -> None:
    (warning,) = scale_warnings(numbered(PERCENT, PIXELS, PERCENT))
    assert "2 of 3 photos" in warning and "percent" in warning and "0..100" in warning and "p0, p2" in warning
    assert not scale_warnings([PIXELS]) and not scale_warnings([outcome(percent=True, objects=0)])


def test_a_drop_whose_boxes_are_all_percent_is_refused() -> None:
    check_scale(numbered(PERCENT, PERCENT))  # two photos may be chance
    check_scale(numbered(PERCENT, PERCENT, PERCENT, PIXELS))
    with pytest.raises(DataError, match="percent"):
        check_scale(numbered(PERCENT, PERCENT, PERCENT))


def test_a_drop_none_of_whose_boxes_reaches_the_middle_is_suspicious() -> None:
    assert not scale_warnings(numbered(*[NEAR] * 9)) and not scale_warnings(numbered(*[NEAR] * 10, PIXELS))
    (warning,) = scale_warnings(numbered(*[NEAR] * 10))
    assert "thousandths" in warning and "smaller copy" in warning and "30%" in warning
