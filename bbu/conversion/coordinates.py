"""Recognises coordinates that are no pixels: shares of the image (0..1), percent (0..100) or thousandths (0..1000)."""

from __future__ import annotations

from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorPhoto

_SHARE_RANGE = (-0.5, 1.5)
"""Coordinates that a share has, with boxes a little outside the image; in pixels they are one corner of the photo."""
_LARGE_SIDE = 28
"""Pixels of the shorter side from which on a photo with boxes in its first pixel alone is not believed."""
_SCALES = (100, 1000)
"""Percent and thousandths, by their largest value."""
_TIMES_THE_AREA = 7
"""How many times the square of a scale a photo must cover, so that all its boxes in that square are suspicious: so an
8-megapixel photo is tried for thousandths."""


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


def suspected_scale(photo: VendorPhoto) -> int:
    """Return 100 for boxes that may be percent and 1000 for thousandths; 0 where they reach farther.

    One photo alone proves nothing: its boxes may all be in a corner.
    """
    low, high = _extent(photo)
    area = photo.width * photo.height
    fitting = [scale for scale in _SCALES if low >= 0 and high <= scale and area >= _TIMES_THE_AREA * scale * scale]
    return fitting[0] if fitting and photo.objects else 0


def _extent(photo: VendorPhoto) -> tuple[float, float]:
    """The smallest and the largest coordinate; (0, 0) without boxes."""
    numbers = [number for item in photo.objects for number in item.box]
    return min(numbers, default=0), max(numbers, default=0)


def _shorter(photo: VendorPhoto) -> int:
    return min(photo.width, photo.height)
