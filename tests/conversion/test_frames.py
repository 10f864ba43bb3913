"""Which pixels a vendor's boxes refer to where EXIF turns a photo."""

from __future__ import annotations

import pytest
from PIL import Image

from bbu.boxes import turn_box
from bbu.conversion.frames import possible_frames
from bbu.conversion.images import TRANSPOSES
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorObject, VendorPhoto
from bbu.schema import Box

BOX = (0, 0, 9, 9)


def photo(size: tuple[int, int], *boxes: Box) -> VendorPhoto:
    return VendorPhoto("p", *size, "A", tuple(VendorObject(i, box, {}, {}) for i, box in enumerate(boxes)))


@pytest.mark.parametrize(
    ("vendor", "orientation", "box", "frame"),
    [
        ((60, 40), 1, BOX, "upright"),
        ((40, 60), 1, BOX, "swapped"),
        ((40, 60), 6, BOX, "upright"),
        ((60, 40), 6, BOX, "stored"),
        ((60, 40), 6, (0, 45, 9, 59), "swapped"),
    ],
)
def test_the_size_decides_where_the_turn_changes_it(vendor, orientation, box, frame) -> None:
    assert possible_frames(photo(vendor, box), (60, 40), orientation, "auto") == (frame,)


@pytest.mark.parametrize(
    ("stored", "orientation"),
    [((60, 40), 2), ((60, 40), 3), ((60, 40), 4), ((60, 60), 5), ((60, 60), 6), ((60, 60), 8)],
)
def test_half_turns_mirror_images_and_squares_leave_two_frames(stored: tuple[int, int], orientation: int) -> None:
    assert possible_frames(photo(stored, BOX), stored, orientation, "auto") == ("upright", "stored")
    assert possible_frames(photo(stored), stored, orientation, "auto") == ("upright",)  # no box, no question
    for frame in ("upright", "stored"):
        assert possible_frames(photo(stored, BOX), stored, orientation, frame) == (frame,)


def test_exchanged_width_and_height_of_a_half_turned_photo_leave_two_frames() -> None:
    assert possible_frames(photo((40, 60), BOX), (60, 40), 3, "auto") == ("swapped", "stored")


@pytest.mark.parametrize(
    ("vendor", "orientation", "exif_frame"),
    [
        ((61, 40), 1, "auto"),
        ((61, 40), 6, "auto"),
        ((60, 40), 6, "upright"),
        ((40, 60), 6, "stored"),
        ((40, 60), 3, "stored"),
    ],
)
def test_a_size_that_contradicts_the_image_or_the_config_is_rejected(vendor, orientation, exif_frame) -> None:
    with pytest.raises(Unusable) as caught:
        possible_frames(photo(vendor, BOX), (60, 40), orientation, exif_frame)
    assert caught.value.reason == "size_mismatch"


@pytest.mark.parametrize("exif_frame", ["upright", "stored"])
def test_a_photo_that_exif_does_not_turn_is_not_asked(exif_frame: str) -> None:
    assert possible_frames(photo((40, 60), BOX), (60, 40), 1, exif_frame) == ("swapped",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_box_turns_with_the_pixels(orientation: int) -> None:
    stored = Image.new("L", (60, 40))
    stored.paste(255, (5, 10, 25, 17))
    upright = stored.transpose(TRANSPOSES[orientation]) if orientation != 1 else stored
    assert upright.getbbox() == turn_box((5, 10, 25, 17), (60, 40), orientation)
