"""smart_resize: one function yields size, placeholder count and box transform."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbu.errors import DataError
from bbu.resize import FACTOR, smart_resize


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sides_are_multiples_of_28_within_the_pixel_bounds(width: int, height: int):
    if max(width, height) > 10 * min(width, height):
        return
    plan = smart_resize(width, height, 3136, 401408)
    assert plan.width % FACTOR == plan.height % FACTOR == 0
    assert 3136 <= plan.width * plan.height <= 401408
    assert plan.placeholders * 4 == plan.grid[1] * plan.grid[2]


@pytest.mark.parametrize("size, resized", [((3000, 4096), (532, 728)), ((1920, 4224), (420, 924))])
def test_camera_photos_get_the_published_sizes(size, resized):
    plan = smart_resize(*size, 3136, 401408)
    assert (plan.width, plan.height) == resized


def test_the_whole_image_stays_the_whole_image():
    plan = smart_resize(1000, 500, 3136, 401408)
    assert plan.to_resized((0, 0, 1000, 500)) == (0, 0, plan.width, plan.height)
    assert plan.to_source((0, 0, plan.width, plan.height)) == (0, 0, 1000, 500)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (10_000, 10)])
def test_impossible_images_are_refused(size):
    with pytest.raises(DataError):
        smart_resize(*size, 3136, 401408)
