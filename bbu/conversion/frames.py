"""Decides, for one photo, which pixels the vendor's boxes refer to: those that people see, or those that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bbu.boxes import TURNED_A_QUARTER
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import VendorObject, VendorPhoto
from bbu.schema import Box

Frame = Literal["upright", "stored", "swapped"]
"""upright: the picture as people see it. stored: the file's pixels, with the EXIF orientation ignored. swapped: as
upright, but the vendor exchanged width and height."""


def possible_frames(
    photo: VendorPhoto, stored: tuple[int, int], orientation: int, exif_frame: str
) -> tuple[Frame, ...]:
    """Find the frames that the vendor's boxes may be in, by exact match of the vendor's width and height.

    Args:
        photo: what the vendor says of it.
        stored: (width, height) of the file's pixels.
        orientation: EXIF orientation, 1 to 8.
        exif_frame: the config's choice for photos that EXIF turns: auto, upright or stored.

    Returns:
        One frame. Two, "stored" last, where the photo has boxes and EXIF leaves its size as it is: half a turn, a
        mirror image, or a square.

    Raises:
        Unusable: the vendor's size fits no frame, or not the one that the config chooses.
    """
    vendor, upright = (photo.width, photo.height), upright_size(stored, orientation)
    if orientation != 1 and exif_frame != "auto":
        return (_forced_frame(vendor, upright if exif_frame == "upright" else stored, exif_frame),)
    if upright not in (vendor, vendor[::-1]):
        raise Unusable("size_mismatch", f"JSON says {_show(vendor)}, the image is {_show(upright)}")
    by_size: Frame = "upright" if vendor == upright else "swapped"
    if orientation == 1:
        return (by_size,)
    if upright == stored:
        return (by_size, "stored") if photo.objects else (by_size,)
    if by_size == "upright":
        return ("upright",)
    # The vendor either ignored the quarter turn or exchanged width and height. The wrong reading of the two puts more
    # boxes outside the picture.
    return ("swapped",) if _outside(photo.objects, stored) > _outside(photo.objects, upright) else ("stored",)


def upright_size(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied."""
    return (stored[1], stored[0]) if orientation in TURNED_A_QUARTER else stored


def _forced_frame(vendor: tuple[int, int], size: tuple[int, int], exif_frame: str) -> Frame:
    if vendor != size:
        detail = f"JSON says {_show(vendor)}, the image under exif_frame {exif_frame} is {_show(size)}"
        raise Unusable("size_mismatch", detail)
    return "stored" if exif_frame == "stored" else "upright"


def _outside(objects: Sequence[VendorObject], size: tuple[int, int]) -> int:
    """Count the boxes that reach more than half their side beyond a picture of `size`."""

    def beyond(box: Box) -> bool:
        x1, y1, x2, y2 = box
        return x2 - size[0] > (x2 - x1) / 2 or y2 - size[1] > (y2 - y1) / 2

    return sum(beyond(item.box) for item in objects)


def _show(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
