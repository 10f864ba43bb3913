"""What only all photos of a drop say together."""

from __future__ import annotations

import dataclasses

import pytest

from bbu.conversion.drop import check_scale, choose_frames, frame_warnings, scale_warnings
from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome
from bbu.errors import DataError
from bbu.schema import BBUObject, View

OBJECT = BBUObject((0, 0, 1, 1), "标签贴纸")


def outcome(frame: str, decides: bool = False, scale: int = 0, objects: int = 1) -> PhotoOutcome:
    view = View(("p",), (OBJECT,) * objects, 28, 28)
    return PhotoOutcome("p", ConvertedPhoto(view, "0" * 64, "A", frame, decides, scale, 0, ()), ())


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
    assert "1 photos: EXIF orientation" in warning and words in warning


def test_without_an_undecided_photo_there_is_nothing_to_say() -> None:
    chosen, choice = choose_frames([UPRIGHT, STORED])
    assert chosen == [UPRIGHT, STORED] and choice.frame is None and not frame_warnings(choice)


def numbered(*scales: int) -> list[PhotoOutcome]:
    """Photos with distinct names and these suspected scales."""
    return [dataclasses.replace(outcome("upright", scale=scale), name=f"p{i}") for i, scale in enumerate(scales)]


def test_photos_that_may_be_percent_are_named() -> None:
    (warning,) = scale_warnings(numbered(100, 0, 100))
    assert "2 of 3 photos" in warning and "percent" in warning and "0..100" in warning and "p0, p2" in warning
    assert not scale_warnings(numbered(0, 0)) and not scale_warnings([outcome("upright", scale=100, objects=0)])


def test_a_drop_whose_boxes_are_all_percent_is_refused() -> None:
    check_scale(numbered(100, 100))  # two photos may be chance
    check_scale(numbered(100, 100, 100, 0))
    with pytest.raises(DataError, match="percent"):
        check_scale(numbered(100, 100, 100))


def test_thousandths_are_a_matter_of_the_whole_drop() -> None:
    assert not scale_warnings(numbered(*[1000] * 9)) and not scale_warnings(numbered(*[1000] * 10, 0))
    (warning,) = scale_warnings(numbered(*[1000] * 10))
    assert "0..1000" in warning
