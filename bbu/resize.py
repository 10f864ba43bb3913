"""The one smart_resize: pixel size, placeholder count and box transform all come from here.

Rule as published with Qwen2-VL (`smart_resize` of its image processor): both sides become multiples of
`factor`, the pixel count stays within [min_pixels, max_pixels], the aspect ratio is kept as well as possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bbu.boxes import scale_box
from bbu.errors import DataError
from bbu.schema import Box

PATCH_SIZE = 14
MERGE_SIZE = 2
FACTOR = PATCH_SIZE * MERGE_SIZE
_MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ResizePlan:
    """How one image is resized."""

    source_width: int
    """Before the resize, in pixels."""
    source_height: int
    """Before the resize, in pixels."""
    width: int
    """After the resize, in pixels; a multiple of FACTOR."""
    height: int
    """After the resize, in pixels; a multiple of FACTOR."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) in ViT patches, as `image_grid_thw` wants it."""
        return 1, self.height // PATCH_SIZE, self.width // PATCH_SIZE

    @property
    def placeholders(self) -> int:
        """Number of `<|image_pad|>` tokens this image takes in a prompt."""
        return (self.height // FACTOR) * (self.width // FACTOR)

    def to_resized(self, box: Box) -> Box:
        """Carry an (x1, y1, x2, y2) box from source pixels to resized pixels."""
        return scale_box(box, (self.source_width, self.source_height), (self.width, self.height))

    def to_source(self, box: Box) -> Box:
        """Carry an (x1, y1, x2, y2) box from resized pixels back to source pixels."""
        return scale_box(box, (self.width, self.height), (self.source_width, self.source_height))


def smart_resize(width: int, height: int, min_pixels: int, max_pixels: int) -> ResizePlan:
    """Plan the resize of an image.

    Args:
        width, height: of the image, in pixels.
        min_pixels, max_pixels: limits of width times height after the resize.

    Raises:
        DataError: the image is empty or more elongated than 200:1.
    """
    if width <= 0 or height <= 0:
        raise DataError(f"image of {width}x{height} pixels is empty; replace the file")
    if max(width, height) / min(width, height) > _MAX_ASPECT_RATIO:
        raise DataError(f"image of {width}x{height} pixels is more elongated than {_MAX_ASPECT_RATIO}:1; crop it")
    new_w, new_h = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height))
    if new_w * new_h > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        new_w, new_h = (max(FACTOR, math.floor(s / scale / FACTOR) * FACTOR) for s in (width, height))
    elif new_w * new_h < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        new_w, new_h = (math.ceil(s * scale / FACTOR) * FACTOR for s in (width, height))
    return ResizePlan(width, height, new_w, new_h)
