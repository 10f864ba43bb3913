"""What becomes of a box: the border, tiny and empty ones, duplicates."""

from __future__ import annotations

import dataclasses

import pytest

from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.labels import load_rules
from bbu.conversion.plan import PhotoPlan, plan_photo
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorObject, VendorPhoto
from bbu.schema import Box


def photo(size: tuple[int, int], *boxes: Box) -> VendorPhoto:
    label = {"标签": "BBU品牌/华为"}
    return VendorPhoto("p", *size, "A", tuple(VendorObject(i, box, {}, label) for i, box in enumerate(boxes)))


def config(**changes: object) -> DataConfig:
    return dataclasses.replace(load_config("smoke").data, **changes)


def plan(*boxes: Box, stored: tuple[int, int] = (168, 112), **changes: object) -> PhotoPlan:
    settings = config(**changes)
    return plan_photo(photo(stored, *boxes), stored, 1, "upright", load_rules(settings), settings)


def reasons(planned: PhotoPlan) -> list[str]:
    return [reject.reason for reject in planned.rejects]


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


LARGE = (1680, 1120)  # ten times the limit on each side


@pytest.mark.parametrize("corner", [(0.0, 0.0), (502.5, 502.5), (1678.0, 1118.0)])
def test_box_that_resizing_makes_tiny_is_kept_at_one_pixel_inside_the_image(corner: tuple[float, float]) -> None:
    x, y = corner
    planned = plan((x, y, x + 2, y + 2), stored=LARGE)
    x1, y1, x2, y2 = planned.objects[0].bbox_2d
    assert x2 - x1 == 1 and y2 - y1 == 1
    assert x1 >= 0 and y1 >= 0 and x2 <= planned.resize.width < 300 and y2 <= planned.resize.height


@pytest.mark.parametrize("box", [(50, 50, 50.9, 80), (50, 50, 80, 50.5), (0.2, 0.2, 0.8, 0.8), (-9, 5, 0.5, 40)])
@pytest.mark.parametrize("least", [0.0, 1.0, 6.0])
def test_box_under_one_pixel_of_the_photo_is_no_box_whatever_the_least_side(box: Box, least: float) -> None:
    assert reasons(plan(box, stored=LARGE, min_box_side=least, min_visible_ratio=0.0)) == ["subpixel_box"]


def test_box_of_just_one_pixel_is_one() -> None:
    assert not reasons(plan((99.7, 5, 100.7, 6), stored=LARGE))


def test_least_side_widens_around_the_middle() -> None:
    assert plan((50, 50, 52, 80), min_box_side=6.0).objects[0].bbox_2d == (48, 50, 54, 80)


def test_the_label_is_read_before_the_box_so_that_an_ignored_object_is_no_bad_box() -> None:
    settings = config(label_hierarchy_file="hierarchy_en")
    planned = plan_photo(photo((9, 9), (5, 5, 5, 5)), (9, 9), 1, "upright", load_rules(settings), settings)
    assert reasons(planned) == ["unknown_object_type"]


def test_exact_duplicate_is_dropped_only_where_the_config_says_so() -> None:
    box = (10.0, 10.0, 50.0, 50.0)
    assert reasons(plan(box, box)) == ["duplicate"]
    assert len(plan(box, box, remove_duplicates=False).objects) == 2


def test_boxes_are_carried_to_the_resized_image() -> None:
    planned = plan((336, 224, 672, 448), stored=(672, 448))
    assert (planned.resize.width, planned.resize.height) == (196, 112)
    assert planned.objects[0].bbox_2d == (98, 56, 196, 112)
