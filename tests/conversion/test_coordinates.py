"""Coordinates that are no pixels of the photo: shares of the image, percent, other scales."""

from __future__ import annotations

import pytest

from bbu.conversion.coordinates import check_shares, may_be_percent, reach_of_boxes
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorObject, VendorPhoto
from bbu.schema import Box

PIXELS = (1200, 900, 2000, 1500)
CORNER = (0, 0, 1, 1)


def photo(*boxes: Box, size: tuple[int, int] = (4000, 3000)) -> VendorPhoto:
    return VendorPhoto("p", *size, "A", tuple(VendorObject(i, box, {}, {}) for i, box in enumerate(boxes)))


@pytest.mark.parametrize(
    "boxes", [[(0.1, 0.2, 0.5, 0.6)], [(0, 0, 1, 1), (0.5, 0.5, 0.6, 0.6)], [(-0.05, 0.5, 1.1, 1.02)]]
)
def test_boxes_that_all_lie_within_the_first_pixel_are_shares(boxes: list[Box]) -> None:
    with pytest.raises(Unusable, match=r"0\.\.1") as caught:
        check_shares(photo(*boxes))
    assert caught.value.reason == "shares_of_image"


@pytest.mark.parametrize("boxes", [[], [CORNER, PIXELS], [(0, 0, 2, 2)]])
def test_a_small_box_beside_another_is_no_share(boxes: list[Box]) -> None:
    check_shares(photo(*boxes))


def test_in_a_photo_of_a_few_pixels_a_box_of_one_pixel_is_no_share() -> None:
    check_shares(photo(CORNER, size=(9, 9)))


@pytest.mark.parametrize(
    ("boxes", "size", "suspicious"),
    [
        ([(15.6, 12.5, 46.9, 54.2)], (640, 480), True),
        ([(0, 0, 100, 100)], (4000, 3000), True),
        ([(0, 0, 100, 101)], (640, 480), False),
        ([(-1, 0, 50, 50)], (640, 480), False),
        ([(0, 0, 90, 90)], (200, 200), False),
        ([(10, 10, 50, 50), PIXELS], (4000, 3000), False),
        ([], (4000, 3000), False),
    ],
)
def test_boxes_may_be_percent_where_all_lie_within_0_to_100_of_a_large_photo(boxes, size, suspicious) -> None:
    assert may_be_percent(photo(*boxes, size=size)) == suspicious


def test_reach_is_the_farthest_edge_as_a_share_of_the_photo() -> None:
    assert reach_of_boxes(photo((0, 0, 1000, 1500), (0, 0, 2400, 30))) == 0.6
    assert reach_of_boxes(photo()) == 0
