"""Writes synthetic BBU rooms in the vendor's two dialects, with the dirt real data has.

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

PHOTOS_PER_SITE = 4
EXIF_ORIENTATION, EXIF_ARTIST, EXIF_MODEL = 274, 315, 272
STORED_TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation → the turn from the upright picture to the stored one."""
OPPOSITE_TURN = {6: 8, 8: 6}
"""EXIF orientation of a quarter turn → the one that undoes it."""
ROTATED_SHARE, OUTSIDE_SHARE, DUPLICATE_SHARE = 0.2, 0.1, 0.1
STATUS = {True: ("true", "连接正确"), False: ("false", "连接错误")}


def write_rooms(folder: Path, photos: int, size: str, seed: int, dirt: bool = True) -> list[str]:
    """Write `photos` usable photo and JSON pairs; returns their names.

    With `dirt`, photo 3 is empty, some are rotated by EXIF, have a box slightly outside or a duplicate, and
    two broken pairs come on top: one truncated JPEG, one broken JSON. Raises DataError for a folder in use.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; name a new folder, or remove this one first")
    folder.mkdir(parents=True, exist_ok=True)
    names = [write_room(folder, index, size, seed, dirt) for index in range(photos)]
    if dirt:
        _truncate(folder / f"{write_room(folder, photos, size, seed, dirt)}.jpeg")
        _break(folder / f"{write_room(folder, photos + 1, size, seed, dirt)}.json")
    return names


def write_room(folder: Path, index: int, size: str, seed: int, dirt: bool) -> str:
    """Write one photo and its JSON, in dialect A for odd and B for even numbers; returns its name."""
    random = Random(f"bbu:{seed}:{size}:{index}")
    name = f"S{index // PHOTOS_PER_SITE:03d}-{index:05d}"
    room = draw_room(random, size)
    if dirt and index == 3:
        room = Room(room.size, ())
    image = draw_photo(room, random)
    annotations = [(part, part.scaled(room.size)) for part in room.parts]
    if dirt:
        annotations = _dirty(annotations, image.size, random)
    turn = random.choice(list(STORED_TURNS)) if dirt and random.random() < ROTATED_SHARE else 1
    stored_frame = turn in OPPOSITE_TURN and random.random() < 0.5
    stored = image.transpose(STORED_TURNS[turn]) if turn in STORED_TURNS else image
    if stored_frame:
        annotations = [(part, turn_box(box, image.size, OPPOSITE_TURN[turn])) for part, box in annotations]
    frame = stored.size if stored_frame else image.size
    _save(stored, folder / f"{name}.jpeg", turn)
    document = (dialect_b if index % 2 == 0 else dialect_a)(annotations, frame)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return name


def dialect_a(annotations: list[tuple[Part, Box]], size: tuple[int, int]) -> dict[str, Any]:
    """Two opposite corners in any order, whole pixels."""
    items = []
    for number, (part, (x1, y1, x2, y2)) in enumerate(annotations):
        corners = [[round(x1), round(y1)], [round(x2), round(y2)]]
        if number % 2:
            corners = [[round(x2), round(y1)], [round(x1), round(y2)]]
        items.append({"coordinates": corners, "properties": _properties(part)})
    return {"info": {"width": size[0], "height": size[1], "depth": 3}, "dataList": items}


def dialect_b(annotations: list[tuple[Part, Box]], size: tuple[int, int]) -> dict[str, Any]:
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
        status_en, status_zh = STATUS[part.correct]
        label_en, label_zh = f"{label_en}/{part.kind.key}_{status_en}", f"{label_zh}/{status_zh}"
    return {
        "content": {"label": label_en, "question": None, "question_ex": None},
        "contentZh": {"标签": label_zh},
    }


def _dirty(annotations: list[tuple[Part, Box]], size: tuple[int, int], random: Random) -> list[tuple[Part, Box]]:
    """Now and then push one box a little over the border, or write one twice."""
    if annotations and random.random() < OUTSIDE_SHARE:
        part, (x1, y1, x2, y2) = max(annotations, key=lambda pair: pair[1][2])
        moved = (x1, y1, max(x2, size[0] + 0.1 * (x2 - x1)), y2)
        if moved[2] - size[0] < 0.3 * (moved[2] - x1):  # still mostly inside
            annotations = [(p, moved if p is part else box) for p, box in annotations]
    if annotations and random.random() < DUPLICATE_SHARE:
        annotations = [*annotations, random.choice(annotations)]
    return annotations


def _save(image: Image.Image, path: Path, orientation: int) -> None:
    """Save with EXIF as a phone writes it, an invented person in it, so that stripping can be checked."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION], exif[EXIF_ARTIST], exif[EXIF_MODEL] = orientation, "Inventory Person", "Phone"
    image.save(path, "JPEG", quality=92, exif=exif)


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _break(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
