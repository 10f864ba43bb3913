"""What becomes of a box: its frame, the border, tiny and empty ones, duplicates."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from bbu.boxes import turn_box
from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.images import TRANSPOSES
from bbu.conversion.labels import load_rules
from bbu.conversion.plan import PhotoPlan, choose_frame, plan_photo
from bbu.conversion.vendor import Unusable, VendorObject, VendorPhoto
from bbu.schema import Box


def photo(size: tuple[int, int], *boxes: Box) -> VendorPhoto:
    label = {"标签": "BBU品牌/华为"}
    return VendorPhoto("p", *size, "A", tuple(VendorObject(i, box, {}, label) for i, box in enumerate(boxes)))


def config(**changes: object) -> DataConfig:
    return dataclasses.replace(load_config("smoke").data, **changes)


def plan(*boxes: Box, stored: tuple[int, int] = (168, 112), **changes: object) -> PhotoPlan:
    settings = config(**changes)
    return plan_photo(photo(stored, *boxes), stored, 1, load_rules(settings), settings)


def reasons(planned: PhotoPlan) -> list[str]:
    return [reject.reason for reject in planned.rejects]


@pytest.mark.parametrize(
    ("vendor", "orientation", "box", "frame"),
    [
        ((60, 40), 1, (0, 0, 9, 9), "upright"),
        ((40, 60), 1, (0, 0, 9, 9), "swapped"),
        ((40, 60), 6, (0, 0, 9, 9), "upright"),
        ((60, 40), 6, (0, 0, 9, 9), "stored"),
        ((60, 40), 6, (0, 45, 9, 59), "swapped"),
        ((60, 40), 3, (0, 0, 9, 9), "upright"),
    ],
)
def test_frame_is_chosen_by_exact_match(vendor, orientation, box, frame) -> None:
    assert choose_frame(photo(vendor, box), (60, 40), orientation) == frame


def test_size_that_fits_neither_way_is_rejected() -> None:
    with pytest.raises(Unusable) as caught:
        choose_frame(photo((61, 40)), (60, 40), 1)
    assert caught.value.reason == "size_mismatch"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_stored_box_turns_with_the_pixels(orientation: int) -> None:
    stored = Image.new("L", (60, 40))
    stored.paste(255, (5, 10, 25, 17))
    assert stored.transpose(TRANSPOSES[orientation]).getbbox() == turn_box((5, 10, 25, 17), (60, 40), orientation)


def test_too_elongated_picture_is_rejected_and_not_a_crash() -> None:
    with pytest.raises(Unusable) as caught:
        plan(stored=(3000, 10))
    assert caught.value.reason == "unusable_size"


def test_box_a_little_outside_is_clipped_and_counted() -> None:
    planned = plan((100, 50, 180, 90))
    assert planned.objects[0].bbox_2d == (100, 50, 168, 90) and planned.clipped == 1 and not planned.rejects


def test_box_mostly_outside_is_dropped_with_its_reason() -> None:
    planned = plan((150, 50, 200, 90), (300, 10, 310, 20))
    assert reasons(planned) == ["mostly_outside", "mostly_outside"] and not planned.objects


def test_fully_outside_box_is_dropped_even_at_ratio_zero() -> None:
    assert reasons(plan((300, 10, 310, 20), min_visible_ratio=0.0)) == ["mostly_outside"]


def test_empty_box_is_dropped_with_its_reason() -> None:
    assert reasons(plan((10, 10, 10, 20))) == ["empty_box"]


@pytest.mark.parametrize("corner", [(0.0, 0.0), (50.2, 50.2), (167.8, 111.8)])
def test_tiny_box_is_kept_at_one_pixel_inside_the_image(corner: tuple[float, float]) -> None:
    x, y = corner
    x1, y1, x2, y2 = plan((x, y, x + 0.2, y + 0.2)).objects[0].bbox_2d
    assert x2 - x1 == 1 and y2 - y1 == 1 and x1 >= 0 and y1 >= 0 and x2 <= 168 and y2 <= 112


def test_least_side_widens_around_the_middle() -> None:
    assert plan((50, 50, 52, 80), min_box_side=6.0).objects[0].bbox_2d == (48, 50, 54, 80)


def test_exact_duplicate_is_dropped_only_where_the_config_says_so() -> None:
    box = (10.0, 10.0, 50.0, 50.0)
    assert reasons(plan(box, box)) == ["duplicate"]
    assert len(plan(box, box, remove_duplicates=False).objects) == 2


def test_boxes_are_carried_to_the_resized_image() -> None:
    planned = plan((336, 224, 672, 448), stored=(672, 448))
    assert (planned.resize.width, planned.resize.height) == (196, 112)
    assert planned.objects[0].bbox_2d == (98, 56, 196, 112)
