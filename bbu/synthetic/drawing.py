"""Draws a room: one look per class, a brand's stripe, and a clear mark of right and wrong connections."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

from bbu.schema import Box
from bbu.synthetic.distribution import Part, Room

_Draw = ImageDraw.ImageDraw
_Color = tuple[int, int, int]

_GREEN: _Color = (40, 170, 70)
_RED: _Color = (225, 45, 35)
_METAL: _Color = (205, 208, 212)
_DARK: _Color = (28, 30, 34)


def draw_photo(room: Room, random: Random) -> Image.Image:
    """Render a room at the size it is photographed; RGB, upright."""
    image = _wall(*room.size.source, random)
    draw = ImageDraw.Draw(image)
    for part in room.parts:
        x1, y1, x2, y2 = part.scaled(room.size)
        PAINTERS[part.kind.key](draw, (x1, y1, x2 - 1, y2 - 1), part)
    return image


def _wall(width: int, height: int, random: Random) -> Image.Image:
    """A cabinet wall: vertical gradient, rails, and grain that a JPEG keeps."""
    top, bottom = random.randint(120, 150), random.randint(85, 115)
    column = Image.new("L", (1, 2))
    column.putdata([top, bottom])
    grey = column.resize((width, height), Image.Resampling.BILINEAR)
    grain = Image.frombytes("L", (64, 64), random.randbytes(64 * 64)).resize((width, height))
    grey = Image.blend(grey, grain, 0.06)
    image = Image.merge("RGB", (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for x in (0.03, 0.95):
        draw.rectangle((width * x, 0, width * (x + 0.02), height), fill=(70, 72, 76))
    return image


def _inner(box: Box, fraction: float) -> Box:
    """The box shrunk by `fraction` of its sides on every edge."""
    dx, dy = (box[2] - box[0]) * fraction, (box[3] - box[1]) * fraction
    return box[0] + dx, box[1] + dy, box[2] - dx, box[3] - dy


def _part(box: Box, x1: float, y1: float, x2: float, y2: float) -> Box:
    """A part of the box, given in fractions of its sides."""
    width, height = box[2] - box[0], box[3] - box[1]
    return box[0] + width * x1, box[1] + height * y1, box[0] + width * x2, box[1] + height * y2


def _line_width(box: Box) -> int:
    return max(1, round(min(box[2] - box[0], box[3] - box[1]) / 10))


def _status(draw: _Draw, box: Box, part: Part) -> None:
    """Right: a green frame. Wrong: a red frame and a red diagonal, as of a loose end."""
    color, width = (_GREEN, _line_width(box)) if part.correct else (_RED, _line_width(box))
    draw.rectangle(box, outline=color, width=width)
    if not part.correct:
        draw.line((box[0], box[3], box[2], box[1]), fill=color, width=width)


def _install_screw(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(90, 95, 100))
    draw.ellipse(_inner(box, 0.15), fill=_METAL)
    draw.rectangle(_part(box, 0.45, 0.25, 0.55, 0.75), fill=_DARK)
    draw.rectangle(_part(box, 0.25, 0.45, 0.75, 0.55), fill=_DARK)
    _status(draw, box, part)


def _cpri(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(30, 70, 200))
    draw.rectangle(_part(box, 0.3, 0.45, 0.7, 1.0), fill=(120, 220, 240))
    _status(draw, box, part)


def _ground_bar(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(190, 110, 50))
    draw.ellipse(_part(box, 0.3, 0.2, 0.7, 0.8), fill=(245, 205, 140))
    _status(draw, box, part)


def _ground_wire(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(235, 215, 40))
    for low in (0.1, 0.5):
        draw.rectangle(_part(box, 0.0, low, 1.0, low + 0.2), fill=(30, 120, 50))
    _status(draw, box, part)


def _odf(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(130, 50, 170))
    draw.ellipse(_part(box, 0.1, 0.3, 0.45, 0.8), fill=(240, 190, 250))
    draw.ellipse(_part(box, 0.55, 0.3, 0.9, 0.8), fill=(240, 190, 250))
    _status(draw, box, part)


def _bbu(draw: _Draw, box: Box, stripe: _Color) -> None:
    draw.rectangle(box, fill=(60, 63, 68), outline=(225, 225, 225), width=_line_width(box))
    draw.rectangle(_part(box, 0.06, 0.15, 0.22, 0.85), fill=stripe)
    for index in range(4):
        left = 0.3 + index * 0.16
        draw.rectangle(_part(box, left, 0.3, left + 0.1, 0.7), fill=_DARK)


def _huawei(draw: _Draw, box: Box, part: Part) -> None:
    _bbu(draw, box, (215, 25, 45))


def _zte(draw: _Draw, box: Box, part: Part) -> None:
    _bbu(draw, box, (20, 130, 235))


def _slots(draw: _Draw, box: Box, filled: int) -> None:
    draw.rectangle(box, fill=_DARK, outline=(180, 182, 186), width=_line_width(box))
    for index in range(filled):
        top = 0.1 + index * 0.165
        draw.rectangle(_part(box, 0.1, top, 0.9, top + 0.1), fill=(165, 175, 150))


def _full(draw: _Draw, box: Box, part: Part) -> None:
    _slots(draw, box, 5)


def _not_full(draw: _Draw, box: Box, part: Part) -> None:
    _slots(draw, box, 2)


def _shield_missing(draw: _Draw, box: Box, part: Part) -> None:
    draw.rectangle(box, fill=(15, 15, 18), outline=(240, 150, 30), width=_line_width(box))
    draw.line((box[0], box[1], box[2], box[3]), fill=(240, 150, 30), width=_line_width(box))


PAINTERS: dict[str, Callable[[_Draw, Box, Part], None]] = {
    "install_screw": _install_screw,
    "cpri_connection": _cpri,
    "ground_bar_screw": _ground_bar,
    "ground_wire_end": _ground_wire,
    "odf_connection": _odf,
    "huawei": _huawei,
    "zte": _zte,
    "full": _full,
    "not_full": _not_full,
    "shield_missing": _shield_missing,
}
