"""Photos with boxes and labels drawn in. Torch-free."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bbu.errors import ModelError
from bbu.schema import Box

_FONT_FILE = "fonts/noto/NotoSansCJKsc-Medium.otf"
"""In the package mpl-font; it has Chinese."""
_MIN_SIDE = 768
"""Pixels of the longer side below which a photo is drawn enlarged: a label would cover a thumbnail's objects."""
_MIN_FONT_SIZE = 12
"""Pixels; Chinese characters are hard to read below."""
_MAX_LABEL = 80
"""Characters of a label that is drawn."""


def draw_detections(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str]) -> Image.Image:
    """Copy a photo and outline and label its objects, one colour for each label.

    Args:
        image: the photo.
        boxes: (x1, y1, x2, y2) in pixels of the photo.
        labels: a text for each box.
    """
    scale = max(1, round(_MIN_SIDE / max(image.size)))
    copy = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(copy), _load_font(max(_MIN_FONT_SIZE, max(copy.size) // 64))
    line = max(2, max(copy.size) // 400)
    labels = [_one_line(label) for label in labels]
    for box, label in zip(boxes, labels, strict=True):
        scaled = tuple(c * scale for c in box)
        draw.rectangle(scaled, outline=_label_colour(label), width=line)
    for box, label in zip(boxes, labels, strict=True):  # after all outlines, so that none crosses a label
        _write_label(draw, font, label, (box[0] * scale, box[1] * scale), copy.size)
    return copy


def _one_line(label: str) -> str:
    """Replace what no font draws, such as line breaks, and shorten what no photo has room for."""
    text = "".join(character if character.isprintable() else " " for character in label)
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load a font that has Chinese, `size` in pixels."""
    return ImageFont.truetype(str(_font_path()), size)


def _label_colour(label: str) -> tuple[int, int, int]:
    """Choose a saturated colour, always the same for the same text."""
    hue = int.from_bytes(hashlib.sha256(label.encode()).digest()[:2]) / 65536
    red, green, blue = colorsys.hls_to_rgb(hue, 0.42, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def _write_label(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    label: str,
    corner: tuple[float, float],
    size: tuple[int, int],
) -> None:
    """Write above the box's corner, or inside where there is no room above; never beyond the right border."""
    left, top, right, bottom = font.getbbox(label)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=_label_colour(label))
    draw.text((x + 3 - left, y + 3 - top), label, font=font, fill="white")


@cache
def _font_path() -> Path:
    spec = find_spec("mpl_font")  # without importing the package, which would import matplotlib
    path = Path(spec.origin or "").parent / _FONT_FILE if spec else None
    if path is None or not path.is_file():
        raise ModelError("no font with Chinese: pip install mpl-font, of the extra `train`")
    return path
