"""Synthetic rooms: deterministic, in both dialects, distributed as the published data."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from bbu import demo
from bbu.errors import DataError
from bbu.resize import smart_resize
from bbu.synthetic.distribution import KINDS, SIZES, _count_objects, draw_room
from bbu.synthetic.drawing import PAINTERS
from bbu.synthetic.rooms import write_rooms


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_rooms(tmp_path / name, 6, "small", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_a_bigger_set_begins_with_the_smaller_one(tmp_path: Path) -> None:
    names = write_rooms(tmp_path / "few", 4, "small", 0)
    write_rooms(tmp_path / "many", 8, "small", 0)
    for name in names:
        assert (tmp_path / "few" / f"{name}.jpeg").read_bytes() == (tmp_path / "many" / f"{name}.jpeg").read_bytes()


def test_objects_per_photo_follow_the_published_quantiles() -> None:
    random = Random("test")
    counts = sorted(_count_objects(random, "full") for _ in range(20_000))
    assert statistics.median(counts) == 4 and counts[-1] == 26 and 18 <= counts[19_800] <= 20


def test_box_sizes_follow_the_published_quantiles() -> None:
    rooms = [draw_room(Random(f"test:{i}"), "full") for i in range(600)]
    sides = sorted(((p.box[2] - p.box[0]) * (p.box[3] - p.box[1])) ** 0.5 for room in rooms for p in room.parts)
    assert sum(len(room.parts) for room in rooms) / len(rooms) == pytest.approx(1917 / 391, abs=0.4)
    assert 60 <= statistics.median(sides) <= 74
    assert 8 <= sides[len(sides) // 100] <= 14 and 460 <= sides[-len(sides) // 100] <= 590


def test_classes_follow_the_published_counts() -> None:
    rooms = [draw_room(Random(f"test:{i}"), "full") for i in range(600)]
    drawn = Counter(part.kind.key for room in rooms for part in room.parts)
    published = sum(kind.count for kind in KINDS)
    assert published == 1917
    for kind in KINDS:
        assert drawn[kind.key] / drawn.total() == pytest.approx(kind.count / published, abs=0.04)


def test_full_size_photos_resize_to_the_published_sizes() -> None:
    for size in SIZES["full"]:
        plan = smart_resize(*size.source, 3136, 401408)
        assert (plan.width, plan.height) == size.resized


def test_small_photos_fit_the_tiny_model() -> None:
    for index in range(100):
        room = draw_room(Random(f"test:{index}"), "small")
        plan = smart_resize(*room.size.source, 784, 28224)
        assert (plan.width, plan.height) == room.size.source and len(room.parts) <= 6
        assert all(min(p.box[2] - p.box[0], p.box[3] - p.box[1]) >= 11.9 for p in room.parts)


def test_every_class_has_its_own_look() -> None:
    assert set(PAINTERS) == {kind.key for kind in KINDS}
    assert len(set(PAINTERS.values())) == len(KINDS)


def test_dirt_is_there_and_clean_rooms_have_none(tmp_path: Path) -> None:
    names = write_rooms(tmp_path / "dirty", 16, "small", 0)
    assert len(list((tmp_path / "dirty").glob("*.jpeg"))) == len(names) + 2
    orientations = {Image.open(p).getexif().get(274) for p in (tmp_path / "dirty").glob("*.jpeg")}
    assert len(orientations) > 1
    with pytest.raises(json.JSONDecodeError):
        json.loads((tmp_path / "dirty" / "S004-00017.json").read_text(encoding="utf-8"))
    with pytest.raises(OSError, match="truncated"):
        Image.open(tmp_path / "dirty" / "S004-00016.jpeg").load()
    write_rooms(tmp_path / "clean", 16, "small", 0, dirt=False)
    assert {Image.open(p).getexif().get(274) for p in (tmp_path / "clean").glob("*.jpeg")} == {1}


def test_demo_writes_pairs_and_refuses_a_folder_in_use(tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path / "v"), "--photos", "4", "--size", "small", "--seed", "3"]
    assert demo.main(argv) == 0
    assert len(list((tmp_path / "v").iterdir())) == 2 * (4 + 2)
    with pytest.raises(DataError, match="not empty"):
        demo.main(argv)


def test_full_size_photo_is_a_phone_photo(tmp_path: Path) -> None:
    (name,) = write_rooms(tmp_path, 1, "full", 0, dirt=False)
    with Image.open(tmp_path / f"{name}.jpeg") as image:
        assert image.size[0] * image.size[1] > 9_000_000


@pytest.mark.parametrize("photos", ["0", "-3", "many"])
def test_demo_refuses_a_count_that_is_none(tmp_path: Path, photos: str) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path), f"--photos={photos}"])
