"""Writes synthetic BBU rooms in the vendor's two dialects, with the dirt that real data has.

Photo i of seed s depends on (s, i) alone, so a bigger set begins with the smaller one.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from bbu.boxes import turn_box
from bbu.errors import DataError
from bbu.schema import Box
from bbu.synthetic.distribution import Part, Room, draw_room
from bbu.synthetic.drawing import draw_photo

_PHOTOS_PER_SITE = 4
_EXIF_ORIENTATION, _EXIF_ARTIST, _EXIF_MODEL = 274, 315, 272
_STORED_TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation → the turn from the upright picture to the stored one."""
_OPPOSITE_TURN = {6: 8, 8: 6}
"""EXIF orientation of a quarter turn → the one that undoes it."""
_ROTATED_SHARE, _OUTSIDE_SHARE, _DUPLICATE_SHARE = 0.2, 0.1, 0.1
"""Shares of the photos that are rotated by EXIF, have a box over the border, or have an object twice."""
_STATUS = {True: ("true", "连接正确"), False: ("false", "连接错误")}


def write_rooms(folder: Path, photos: int, size: str, seed: int, dirt: bool = True) -> list[str]:
    """Write photos of synthetic rooms, each with its JSON.

    Args:
        folder: a new or empty folder.
        photos: how many usable photos to write.
        size: "full" for phone photos, "small" for photos that fit the tiny model.
        seed: the same seed gives the same bytes.
        dirt: leave photo 3 empty, rotate some photos by EXIF, push some boxes slightly over the border, write some
            boxes twice, and add two broken pairs: one truncated JPEG, one broken JSON.

    Returns:
        The names of the usable photos.

    Raises:
        DataError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; name a new folder, or remove this one first")
    folder.mkdir(parents=True, exist_ok=True)
    names = [_write_room(folder, index, size, seed, dirt) for index in range(photos)]
    if dirt:
        _truncate(folder / f"{_write_room(folder, photos, size, seed, dirt)}.jpeg")
        _break(folder / f"{_write_room(folder, photos + 1, size, seed, dirt)}.json")
    return names


def _write_room(folder: Path, index: int, size: str, seed: int, dirt: bool) -> str:
    """Write one photo and its JSON, in dialect A for odd and B for even numbers, and return its name."""
    random = Random(f"bbu:{seed}:{size}:{index}")
    name = f"S{index // _PHOTOS_PER_SITE:03d}-{index:05d}"
    room = draw_room(random, size)
    if dirt and index == 3:
        room = Room(room.size, ())
    image = draw_photo(room, random)
    annotations = [(part, part.scaled(room.size)) for part in room.parts]
    if dirt:
        annotations = _dirty(annotations, image.size, random)
    turn = random.choice(list(_STORED_TURNS)) if dirt and random.random() < _ROTATED_SHARE else 1
    stored_frame = turn in _OPPOSITE_TURN and random.random() < 0.5
    stored = image.transpose(_STORED_TURNS[turn]) if turn in _STORED_TURNS else image
    if stored_frame:
        annotations = [(part, turn_box(box, image.size, _OPPOSITE_TURN[turn])) for part, box in annotations]
    frame = stored.size if stored_frame else image.size
    _save(stored, folder / f"{name}.jpeg", turn)
    document = (_dialect_b if index % 2 == 0 else _dialect_a)(annotations, frame)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return name


def _dialect_a(annotations: list[tuple[Part, Box]], size: tuple[int, int]) -> dict[str, Any]:
    """Two opposite corners in any order, whole pixels."""
    items = []
    for number, (part, (x1, y1, x2, y2)) in enumerate(annotations):
        corners = [[round(x1), round(y1)], [round(x2), round(y2)]]
        if number % 2:
            corners = [[round(x2), round(y1)], [round(x1), round(y2)]]
        items.append({"coordinates": corners, "properties": _properties(part)})
    return {"info": {"width": size[0], "height": size[1], "depth": 3}, "dataList": items}


def _dialect_b(annotations: list[tuple[Part, Box]], size: tuple[int, int]) -> dict[str, Any]:
    """A feature collection of extent polygons, floats, nested or flat, among metadata to ignore."""
    features = []
    for number, (part, (x1, y1, x2, y2)) in enumerate(annotations):
        ring = [[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]
        geometry = {"type": "ExtentPolygon", "coordinates": [ring] if number % 2 == 0 else ring}
        features.append({"type": "Feature", "geometry": geometry, "properties": _properties(part)})
    return {
        "info": {"width": size[0], "height": size[1], "depth": 3},
        "tagInfo": {},
        "version": "1.0",
        "statistcs": {"objects": len(features)},
        "workload": {"seconds": 0},
        "markResult": {"type": "FeatureCollection", "features": features},
    }


def _properties(part: Part) -> dict[str, Any]:
    label_en, label_zh = part.kind.label_en, part.kind.label_zh
    if part.correct is not None:
        status_en, status_zh = _STATUS[part.correct]
        label_en, label_zh = f"{label_en}/{part.kind.key}_{status_en}", f"{label_zh}/{status_zh}"
    return {
        "content": {"label": label_en, "question": None, "question_ex": None},
        "contentZh": {"标签": label_zh},
    }


def _dirty(annotations: list[tuple[Part, Box]], size: tuple[int, int], random: Random) -> list[tuple[Part, Box]]:
    """Push one box of some photos a little over the border, and write one box of some photos twice."""
    if annotations and random.random() < _OUTSIDE_SHARE:
        part, (x1, y1, x2, y2) = max(annotations, key=lambda pair: pair[1][2])
        moved = (x1, y1, max(x2, size[0] + 0.1 * (x2 - x1)), y2)
        if moved[2] - size[0] < 0.3 * (moved[2] - x1):  # still mostly inside
            annotations = [(p, moved if p is part else box) for p, box in annotations]
    if annotations and random.random() < _DUPLICATE_SHARE:
        annotations = [*annotations, random.choice(annotations)]
    return annotations


def _save(image: Image.Image, path: Path, orientation: int) -> None:
    """Save with EXIF as a phone writes it; an invented person in it lets tests check that it is stripped."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION], exif[_EXIF_ARTIST], exif[_EXIF_MODEL] = orientation, "Inventory Person", "Phone"
    image.save(path, "JPEG", quality=92, exif=exif)


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _break(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
