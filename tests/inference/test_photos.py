"""Which photos a person names, and in what forms; torch-free but for the decoding."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import ExifTags, Image

from bbu.errors import DataError
from bbu.inference.photos import Photo, find_photos, iterate_photos


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A phone's photo, 40 x 20 as stored, 20 x 40 upright: red above green."""
    stored = Image.new("RGB", (40, 20), (0, 128, 0))
    stored.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn to the right
    path = tmp_path / "phone.jpg"
    stored.save(path, exif=exif, quality=95)
    return path


def opened(path: Path) -> Image.Image:
    return Image.open(path)


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": Path.read_bytes,
    "stream": lambda path: io.BytesIO(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "image": opened,
    "decoded image": lambda path: opened(path).convert("RGB"),
    "upright array": lambda path: numpy.asarray(opened(path).transpose(Image.Transpose.ROTATE_270)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_photo_of_a_phone_is_upright_in_every_form(photo: Path, form: Callable[[Path], Any]):
    given = form(photo)
    (one,) = iterate_photos(given)
    for _ in range(2):  # a result that draws itself reads the photo again
        image = one.load()
        assert (image.size, image.mode) == ((20, 40), "RGB")
        red, green = image.getpixel((10, 5)), image.getpixel((10, 35))
        assert red[0] > 200 and red[1] < 60 and green[0] < 60 and green[1] > 90


def test_an_upright_copy_is_not_turned_again(photo: Path):
    from PIL import ImageOps

    (one,) = iterate_photos(ImageOps.exif_transpose(opened(photo)))
    assert one.load().size == (20, 40)


def test_an_image_that_is_not_decoded_yet_stays_so(photo: Path):
    image = opened(photo)
    (one,) = iterate_photos(image)
    one.load()
    assert image.tile, "its pixels would stay in memory as long as the caller keeps the image"


@pytest.mark.parametrize(
    ("array", "grey"),
    [
        (numpy.full((6, 8), 200, numpy.uint8), 200),
        (numpy.full((6, 8, 1), 200, numpy.uint8), 200),
        (numpy.full((6, 8, 3), 200, numpy.uint8), 200),
        (numpy.full((6, 8, 4), (100, 100, 100, 0), numpy.uint8), 255),  # transparent, on white
        (numpy.full((12, 16, 3), 200, numpy.uint8)[::2, ::2], 200),  # a view
    ],
)
def test_arrays_are_rows_columns_channels(array: numpy.ndarray, grey: int):
    (one,) = iterate_photos(array)
    assert one.load().size == (8, 6) and one.load().getpixel((0, 0)) == (grey,) * 3


class Tensor:
    """Stands for torch's, which this test does not load."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (numpy.zeros((3, 50, 60), numpy.uint8), r"channels last: array\.transpose\(1, 2, 0\)"),
        (numpy.zeros((50, 60, 5), numpy.uint8), "use HxW, HxWx3 or HxWx4"),
        (numpy.zeros((60,), numpy.uint8), "use HxW"),
        (numpy.zeros((0, 60, 3), numpy.uint8), "is empty"),
        (numpy.zeros((50, 60, 3), numpy.float32), r"must be uint8; convert it \(array \* 255"),
        (numpy.zeros((50, 60), numpy.uint16), "array >> 8"),
        (numpy.zeros((50, 60), bool), "must be uint8"),
        (None, "a NoneType is no photo"),
        ({"path": "a.jpg"}, "a dict is no photo"),
        (Tensor(), r"tensor\.permute"),
        (io.StringIO("text"), "opened as text"),
    ],
)
def test_what_could_be_misread_is_refused_in_words(item: Any, reason: str):
    with pytest.raises(DataError, match=reason):
        list(iterate_photos([item]))


def test_one_photo_or_many_in_any_mixture_come_in_their_order(photo: Path):
    batch = numpy.zeros((2, 6, 8, 3), numpy.uint8)
    assert [one.name for one in iterate_photos([photo, batch[0], str(photo)])] == [str(photo), "photo 1", str(photo)]
    assert len(list(iterate_photos(batch))) == 2 and list(iterate_photos([])) == []


def test_a_generator_is_read_only_as_far_as_needed():
    def endless() -> Iterator[numpy.ndarray]:
        while True:
            yield numpy.zeros((6, 8), numpy.uint8)

    photos = iterate_photos(endless())
    assert [next(photos).name for _ in range(3)] == ["photo 0", "photo 1", "photo 2"]


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [break_off, empty, make_fifo, make_folder, Path.unlink])
def test_a_file_that_cannot_be_read_is_named_in_one_line(photo: Path, damage: Callable[[Path], object]):
    damage(photo)
    with pytest.raises(DataError, match=r"phone\.jpg: cannot be read \(.+\)$") as caught:
        Photo(str(photo), photo).load()
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "drop"
    for name in ("b.jpg", "a.PNG", "sub/c.tiff", "sub/notes.json", "x.heic", ".hidden/d.jpg", "._e.jpg", "[1].jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "sub/loop").symlink_to(root)
    return root


def names(root: Path, *places: str, leave_out: Path | None = None) -> list[str]:
    return [str(path.relative_to(root)) for path in find_photos(places, leave_out).paths]


def test_a_folder_stands_for_the_photos_in_it_and_below_sorted(folder: Path):
    assert names(folder, str(folder)) == ["[1].jpg", "a.PNG", "b.jpg", "sub/c.tiff"]
    files = find_photos([folder])
    assert files.skipped == {".json": 1, ".heic": 1}
    assert files.describe_skipped() == "2 files that are no photos (.heic 1, .json 1)"
    assert names(folder, str(folder), leave_out=folder / "sub") == ["[1].jpg", "a.PNG", "b.jpg"]


def test_a_pattern_stands_for_what_it_matches(folder: Path):
    assert names(folder, f"{folder}/*.jpg") == ["[1].jpg", "b.jpg"]
    assert names(folder, f"{folder}/s*") == ["sub/c.tiff"], "a folder that matches stands for its photos"
    assert names(folder, f"{folder}/**/*.tiff") == ["sub/c.tiff"]
    assert names(folder, f"{folder}/[1].jpg") == ["[1].jpg"], "a file of that name comes first"


def test_each_file_is_listed_once_and_the_order_given_stays(folder: Path):
    assert names(folder, f"{folder}/b.jpg", str(folder))[0] == "b.jpg"
    assert len(names(folder, f"{folder}/b.jpg", str(folder), f"{folder}/*.jpg")) == 4


def test_the_home_folder_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert names(folder, "~/drop/*.jpg") == ["[1].jpg", "b.jpg"]


def test_a_file_named_by_itself_is_listed_whatever_it_is(folder: Path):
    assert names(folder, f"{folder}/x.heic", f"{folder}/absent.jpg") == ["x.heic", "absent.jpg"]


ODD_PATHS = ("x" * 5000, "a\0b.jpg", "https://host/a.jpg", "~nobody-of-that-name/a.jpg", "/dev/null")


@pytest.mark.parametrize("name", ODD_PATHS)
def test_a_path_of_any_form_that_is_no_photo_is_one_line(name: str):
    (one,) = iterate_photos(name)
    with pytest.raises(DataError, match=r"cannot be read \((no such file|not a plain file)"):
        one.load()


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(DataError, match="an empty path is no photo"):
        list(iterate_photos([""]))


@pytest.mark.parametrize("place", ["sub/loop/sub/*.json", "*.bmp", ".hidden/none*"])
def test_a_folder_or_pattern_without_photos_is_refused(folder: Path, place: str):
    with pytest.raises(DataError, match="no photos there"):
        find_photos([f"{folder}/{place}"])
