"""Recognises coordinates that are no pixels of the photo: shares of the image (0..1), percent, other scales."""

from __future__ import annotations

from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorPhoto

_SHARE_RANGE = (-0.5, 1.5)
"""Coordinates that a share has, with boxes a little outside the image; in pixels they are one corner of the photo."""
_LARGE_SIDE = 28
"""Pixels of the shorter side from which on a photo with boxes in its first pixel alone is not believed."""
_PERCENT = 100
_TIMES_THE_AREA = 7
"""How many times the square of 100 pixels a photo must cover, so that all its boxes in that square are suspicious."""


def check_shares(photo: VendorPhoto) -> None:
    """Check that the boxes are not written as shares of the image.

    Raises:
        Unusable: all coordinates lie within 0..1, give or take a half, in a photo of more than a few pixels.
    """
    low, high = _extent(photo)
    if photo.objects and _SHARE_RANGE[0] <= low and high <= _SHARE_RANGE[1] and _shorter(photo) >= _LARGE_SIDE:
        size = f"{photo.width}x{photo.height}"
        raise Unusable(
            "shares_of_image", f"all boxes lie within 0..1 of {size} pixels: shares of the image, not pixels"
        )


def may_be_percent(photo: VendorPhoto) -> bool:
    """Whether all boxes lie within 0..100 of a much larger photo, as percent would; it may be chance in one photo."""
    low, high = _extent(photo)
    is_large = photo.width * photo.height >= _TIMES_THE_AREA * _PERCENT**2
    return bool(photo.objects) and is_large and low >= 0 and high <= _PERCENT


def reach_of_boxes(photo: VendorPhoto) -> float:
    """How far the boxes reach to the right or down, as a share of the photo; 0 without boxes.

    Coordinates of a smaller copy, or thousandths of the image, never reach far.
    """
    shares = (max(item.box[2] / photo.width, item.box[3] / photo.height) for item in photo.objects)
    return round(max(shares, default=0.0), 4)


def _extent(photo: VendorPhoto) -> tuple[float, float]:
    """The smallest and the largest coordinate; (0, 0) without boxes."""
    numbers = [number for item in photo.objects for number in item.box]
    return min(numbers, default=0), max(numbers, default=0)


def _shorter(photo: VendorPhoto) -> int:
    return min(photo.width, photo.height)
