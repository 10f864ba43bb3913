"""Pictures with boxes and labels drawn in, for people. Torch-free."""

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

FONT_FILE = "fonts/noto/NotoSansCJKsc-Medium.otf"
LEAST_SIDE = 768
"""Pictures smaller than this are drawn enlarged: a label of 12 px would cover a thumbnail's objects."""


def draw_detections(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str]) -> Image.Image:
    """A copy of `image` with `boxes` (its pixels) outlined and labelled, one colour for each label."""
    scale = max(1, round(LEAST_SIDE / max(image.size)))
    shown = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(shown), label_font(max(12, max(shown.size) // 64))
    line = max(2, max(shown.size) // 400)
    for box, label in zip(boxes, labels, strict=True):
        scaled = tuple(c * scale for c in box)
        draw.rectangle(scaled, outline=colour_of(label), width=line)
    for box, label in zip(boxes, labels, strict=True):  # afterwards, so that no outline crosses a label
        _write_label(draw, font, label, (box[0] * scale, box[1] * scale), shown.size)
    return shown


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """A font that has Chinese, `size` in pixels; it comes with the package mpl-font."""
    return ImageFont.truetype(str(_font_path()), size)


def colour_of(label: str) -> tuple[int, int, int]:
    """Always the same saturated colour for the same text."""
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
    """Above the box's corner, or inside it where there is no room above; never beyond the right border."""
    left, top, right, bottom = font.getbbox(label)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour_of(label))
    draw.text((x + 3 - left, y + 3 - top), label, font=font, fill="white")


@cache
def _font_path() -> Path:
    spec = find_spec("mpl_font")  # found without importing it: that would import matplotlib
    path = Path(spec.origin or "").parent / FONT_FILE if spec else None
    if path is None or not path.is_file():
        raise ModelError("no font with Chinese: pip install mpl-font, of the extra `train`")
    return path
