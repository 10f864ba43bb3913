"""Decides, for one photo, what becomes of every box: turn, clip, drop, widen, deduplicate.

Pure geometry and labels, no pixels; `images.py` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from bbu.boxes import box_area, turn_box
from bbu.config.domains import DataConfig
from bbu.conversion.frames import Frame, upright_size
from bbu.conversion.labels import LabelRules
from bbu.conversion.rejects import Reject, Unusable
from bbu.conversion.vendor import VendorPhoto
from bbu.errors import DataError
from bbu.resize import ResizePlan, smart_resize
from bbu.schema import BBUObject, Box

_ONE_PIXEL = 1 - 1e-6
"""The shortest side of a box, in pixels of the vendor's photo, with room for rounding. A detector of anything shorter
would have nothing to see; it comes of another unit or of a slip of the mouse."""


@dataclass(frozen=True)
class PhotoPlan:
    """What becomes of one photo."""

    resize: ResizePlan
    """How its upright picture is resized."""
    objects: tuple[BBUObject, ...]
    """Its objects, in pixels of the resized picture."""
    rejects: tuple[Reject, ...]
    """Its objects that are left out."""
    clipped: int
    """Boxes that are cut at the image border."""
    respelled: tuple[str, ...]
    """Labels of its objects that the label files spell with other brackets or character widths."""


def plan_photo(
    photo: VendorPhoto, stored: tuple[int, int], orientation: int, frame: Frame, rules: LabelRules, config: DataConfig
) -> PhotoPlan:
    """Plan what becomes of one photo.

    Args:
        photo: what the vendor says of it.
        stored: (width, height) of the file's pixels, before the EXIF orientation is applied.
        orientation: EXIF orientation, 1 to 8.
        frame: the frame of the vendor's boxes, one of `possible_frames`.
        rules: how labels are written.
        config: how boxes are treated.

    Raises:
        Unusable: no resize fits.
    """
    upright = upright_size(stored, orientation)
    resize = _plan_resize(upright, config)
    objects: list[BBUObject] = []
    seen: set[BBUObject] = set()  # a list would take minutes for a file of thousands of objects
    rejects = list(photo.rejects)
    clipped = 0
    respelled: list[str] = []
    for item in photo.objects:
        box = turn_box(item.box, stored, orientation) if frame == "stored" else item.box
        try:
            description = rules.describe(item)  # first: what the config ignores may have any box
            inside = _clip(box, upright, config.min_visible_ratio)
            planned = BBUObject(_resized(inside, resize, config.min_box_side), description)
            _check_new(planned, seen, config.remove_duplicates)
        except Unusable as unusable:
            rejects.append(Reject(photo.name, unusable.reason, unusable.detail, item.index))
        else:
            objects.append(planned)
            seen.add(planned)
            clipped += inside != box
            respelled += rules.respelled(item)
    return PhotoPlan(resize, tuple(objects), tuple(rejects), clipped, tuple(respelled))


def _clip(box: Box, size: tuple[int, int], min_visible_ratio: float) -> Box:
    """Cut a box at the border of an image of `size` (width, height).

    Raises Unusable when the box is empty, too little of it is inside, or that is narrower than a pixel.
    """
    (width, height), (x1, y1, x2, y2) = size, box
    area = box_area(box)
    if area <= 0:
        raise Unusable("empty_box", f"box {_show(box)} has no area")
    cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    visible = box_area(cut) / area
    if visible <= 0 or visible < min_visible_ratio:
        raise Unusable("mostly_outside", f"{visible:.0%} of box {_show(box)} is inside {width}x{height}")
    if min(cut[2] - cut[0], cut[3] - cut[1]) < _ONE_PIXEL:
        raise Unusable("subpixel_box", f"box {_show(box)} is narrower than one pixel of the {width}x{height} photo")
    return cut


def _plan_resize(upright: tuple[int, int], config: DataConfig) -> ResizePlan:
    width, height = upright
    try:
        return smart_resize(width, height, config.min_pixels, config.max_pixels)
    except DataError as error:
        raise Unusable("unusable_size", str(error)) from error


def _resized(box: Box, resize: ResizePlan, min_side: float) -> Box:
    x1, y1, x2, y2 = (float(round(c)) for c in resize.to_resized(box))
    x1, x2 = _widened(x1, x2, min_side, resize.width)
    y1, y2 = _widened(y1, y2, min_side, resize.height)
    return x1, y1, x2, y2


def _widened(low: float, high: float, shortest: float, limit: int) -> tuple[float, float]:
    """Grow an interval to `shortest` (rounded up to whole pixels, at least 1) around its middle, inside 0..limit."""
    side = min(max(1, -(-shortest // 1)), limit)
    if high - low >= side:
        return low, high
    start = min(max((low + high - side) // 2, 0), limit - side)
    return float(start), float(start + side)


def _check_new(planned: BBUObject, earlier: Set[BBUObject], remove_duplicates: bool) -> None:
    if remove_duplicates and planned in earlier:
        raise Unusable("duplicate", f"{planned.desc} at {_show(planned.bbox_2d)} is there already")


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{c:g}" for c in box) + "]"
