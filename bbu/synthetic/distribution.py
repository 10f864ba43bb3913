"""What the published data looks like in numbers, and random rooms drawn from it.

Real data: 391 photos, 1,917 objects, median 4 a photo, 99th percentile 19, at most 26; resized sizes mostly
532x728, 420x896, 420x924; square root of the box area 11 px at the 1st percentile, 67 median, 527 at the 99th.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from bbu.boxes import boxes_overlap, scale_box
from bbu.schema import Box


@dataclass(frozen=True)
class Kind:
    """One class of parts."""

    key: str
    """Its name in this package."""
    label_en: str
    """The vendor's English label, without status."""
    label_zh: str
    """The vendor's Chinese label, without status."""
    count: int
    """Objects of this class in the real data."""
    side: float
    """Median square root of the box area, in pixels of a full-size photo after the resize, before crowding."""
    spread: float
    """Standard deviation of the logarithm of that side."""
    aspect: float
    """Typical width divided by height."""
    has_status: bool
    """Whether its parts are connections, which can be made correctly or wrongly."""


def _connection(key: str, name_zh: str, count: int, aspect: float) -> Kind:
    zh = f"连接点（螺丝）/{name_zh}"
    return Kind(key, f"connection_point/{key}", zh, count, 56.0, 0.62, aspect, True)


def _large(key: str, label_en: str, label_zh: str, count: int, aspect: float) -> Kind:
    return Kind(key, label_en, label_zh, count, 275.0, 0.66, aspect, False)


KINDS = (
    _connection("install_screw", "BBU安装螺丝", 582, 1.0),
    _connection("cpri_connection", "CPRI光缆和BBU连接点", 457, 0.7),
    _large("huawei", "bbu_brand/huawei", "BBU品牌/华为", 299, 2.6),
    _large("not_full", "cabinet_space/not_full", "机柜空间/非满载", 137, 1.2),
    _large("full", "cabinet_space/full", "机柜空间/满载", 111, 1.2),
    _connection("ground_bar_screw", "地排处螺丝", 89, 1.6),
    _connection("ground_wire_end", "BBU接地线机柜接地端", 87, 0.8),
    _connection("odf_connection", "BBU尾纤和ODF连接点", 58, 1.3),
    _large("zte", "bbu_brand/zte", "BBU品牌/中兴", 51, 2.6),
    _large("shield_missing", "wind_shield/not_installed", "挡风板/未安装", 46, 3.0),
)
_WRONG_SHARE = 0.2
"""Share of connections that are wrongly made; the published counts do not say."""


@dataclass(frozen=True)
class PhotoSize:
    """One size of photos.

    The published sizes beyond the first are "420x896, 420x924 …"; the rest of the 391 photos is shared among them.
    """

    resized: tuple[int, int]
    """(width, height) after the resize, in pixels."""
    source: tuple[int, int]
    """(width, height) as photographed, in pixels."""
    weight: int
    """Photos of this size in the real data."""


SIZES = {
    "full": (
        PhotoSize((532, 728), (3024, 4032), 213),
        PhotoSize((420, 896), (2160, 4560), 100),
        PhotoSize((420, 924), (2160, 4800), 78),
    ),
    "small": (
        PhotoSize((140, 196), (140, 196), 213),
        PhotoSize((112, 224), (112, 224), 100),
        PhotoSize((112, 252), (112, 252), 78),
    ),
}
"""Full size: phone photos of 10 to 12 megapixels, resized under 401,408 pixels. Small: under 28,224."""
_COUNT_QUANTILES = ((0.0, 1), (0.25, 2), (0.5, 4), (0.75, 6), (0.9, 9), (0.99, 19), (1.0, 26))
"""(share of photos, objects): the inverse distribution function of objects per photo."""
_SMALL_COUNT_LIMIT = 6
_SHORTEST_SIDE = {"full": 8.0, "small": 12.0}
"""Shortest side of a part in resized px; in a small photo smaller ones show nothing."""


@dataclass(frozen=True)
class Part:
    """One part of a room."""

    kind: Kind
    """Its class."""
    box: Box
    """(x1, y1, x2, y2) in pixels of the resized photo."""
    correct: bool | None
    """Whether the connection is made correctly; None for a class without status."""

    def scaled(self, size: PhotoSize) -> Box:
        """The box in pixels of the photographed picture."""
        x1, y1, x2, y2 = scale_box(self.box, size.resized, size.source)
        return round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2)


@dataclass(frozen=True)
class Room:
    """A room before it is drawn."""

    size: PhotoSize
    """Size of its photo."""
    parts: tuple[Part, ...]
    """Its parts, those of large classes first."""


def draw_room(random: Random, size: str) -> Room:
    """Draw one room's layout; `size` is "full" or "small"."""
    sizes = SIZES[size]
    photo = random.choices(sizes, [choice.weight for choice in sizes])[0]
    kinds = random.choices(KINDS, [kind.count for kind in KINDS], k=_count_objects(random, size))
    parts: list[Part] = []
    for kind in sorted(kinds, key=lambda kind: -kind.side):
        box = _place(random, kind, photo.resized, size, [part.box for part in parts])
        if box is not None:
            parts.append(Part(kind, box, random.random() >= _WRONG_SHARE if kind.has_status else None))
    return Room(photo, tuple(parts))


def _count_objects(random: Random, size: str) -> int:
    """Draw the number of objects of one photo, by the published quantiles, linear between them."""
    share = random.random()
    (p0, n0), (p1, n1) = next(pair for pair in pairwise(_COUNT_QUANTILES) if share <= pair[1][0])
    count = round(n0 + (n1 - n0) * (share - p0) / (p1 - p0))
    return min(count, _SMALL_COUNT_LIMIT) if size == "small" else count


def _place(random: Random, kind: Kind, room: tuple[int, int], size: str, taken: list[Box]) -> Box | None:
    """Choose a free spot for a part, smaller with each failed try; None when the room is full."""
    scale = room[0] / (532 if size == "full" else 532 * 0.6)
    side = kind.side * scale * math.exp(random.gauss(0, kind.spread))
    aspect = kind.aspect * math.exp(random.gauss(0, 0.12))
    # By 1 % a try at first, so that a part keeps its size where it can, then by 5 % to fit into a crowded photo.
    for attempt in range(120):
        side_now = side * 0.99 ** min(attempt, 60) * 0.95 ** max(attempt - 60, 0)
        side_now = max(side_now, _SHORTEST_SIDE[size] * math.sqrt(max(aspect, 1 / aspect)))
        box = _spot(random, side_now, aspect, room)
        if not any(boxes_overlap(box, other) for other in taken):
            return box
    return None


def _spot(random: Random, side: float, aspect: float, room: tuple[int, int]) -> Box:
    width = min(side * math.sqrt(aspect), room[0] * 0.96)
    height = min(side / math.sqrt(aspect), room[1] * 0.96)
    x = random.uniform(0, room[0] - width)
    y = random.uniform(0, room[1] - height)
    return x, y, x + width, y + height
