"""The photos that a person names for inference: files, folders, patterns, and images in memory. Torch-free."""

from __future__ import annotations

import glob
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from PIL import Image

from bbu.errors import DataError

PhotoInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | numpy.ndarray
"""A photo, or several: a path, folder or pattern; the bytes of an image file, or such a file opened for reading; an
image of Pillow; an array [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA) of uint8."""
_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".mpo"))
"""Which files of a folder or pattern are photos. A file that is named by itself may be called anything."""
_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class Photo:
    """One photo that is not decoded yet."""

    name: str
    """Its path as it was given, or its number among the photos."""
    content: Path | bytes | Image.Image | numpy.ndarray
    """Where its pixels come from."""

    @property
    def is_file(self) -> bool:
        """Whether the photo is read from a path each time, and takes no memory meanwhile."""
        return isinstance(self.content, Path)

    def load(self) -> Image.Image:
        """Decode the photo: upright, RGB.

        Raises:
            DataError: it cannot be read.
        """
        from bbu.data.images import describe_damage, upright_rgb

        try:
            with self._opened() as image:
                return upright_rgb(image)
        # Whatever one photo raises is that photo's error, and does not end the others.
        except Exception as error:
            raise DataError(f"{self.name}: cannot be read ({describe_damage(error)})") from error

    def _opened(self) -> Any:
        """The image, in a context that closes what this function opened."""
        content = self.content
        if isinstance(content, Image.Image):
            return _reopened(content) or nullcontext(content)  # the caller's image stays open
        if isinstance(content, numpy.ndarray):
            return Image.fromarray(content)
        if isinstance(content, bytes):
            return Image.open(io.BytesIO(content))
        # os.path, because Path.exists() raises OSError for a name that is too long.
        if not os.path.exists(content):
            raise DataError("no such file; check the name")
        if not os.path.isfile(content):  # a FIFO would wait for its writer
            raise DataError("not a plain file")
        return Image.open(content)


@dataclass(frozen=True)
class PhotoFiles:
    """The files that some paths, folders and patterns stand for."""

    paths: tuple[Path, ...]
    """Each file once: in the order of what was given, sorted inside a folder or pattern."""
    skipped: Mapping[str, int]
    """Suffix → number of files in folders and patterns that are no photos."""

    def describe_skipped(self) -> str:
        """Say how many files were left out: `3 files that are no photos (.json 2, .heic 1)`; empty for none."""
        counts = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(self.skipped.items()))
        return f"{sum(self.skipped.values())} files that are no photos ({counts})" if counts else ""


def find_photos(places: Iterable[str | os.PathLike[str]], leave_out: Path | None = None) -> PhotoFiles:
    """List the photos that paths, folders and patterns stand for.

    A folder stands for all photos in it and in its subfolders, linked ones included; hidden files and folders
    (`.name`) are left out. A pattern (`site-*/*.jpg`, `**` for any depth) stands for the photos and folders that it
    matches. `~` is the home folder. A file that is named by itself is listed even where it does not exist.

    Args:
        places: paths of files and folders, and patterns.
        leave_out: a folder whose files are not listed, such as that of the drawn pictures.

    Raises:
        DataError: a folder or pattern without photos, or a folder that cannot be listed.
    """
    paths: dict[Path, None] = {}  # in order, each once
    skipped: Counter[str] = Counter()
    for place in places:
        if not os.fspath(place):
            raise DataError("an empty path is no photo; check the variable that it came from")
        path = Path(os.path.expanduser(place))
        files = _files_behind(path)
        if files is None:
            paths[path] = None
            continue
        files = [file for file in files if leave_out is None or not _is_below(file, leave_out)]
        photos = [file for file in files if file.suffix.lower() in _SUFFIXES]
        if not photos:
            raise DataError(f"{place}: no photos there ({' '.join(sorted(_SUFFIXES))}); check the name")
        paths |= dict.fromkeys(photos)
        skipped.update(file.suffix.lower() for file in files if file.suffix.lower() not in _SUFFIXES)
    return PhotoFiles(tuple(paths), dict(skipped))


def iterate_photos(images: PhotoInput | Iterable[PhotoInput]) -> Iterator[Photo]:
    """Yield photos one by one, taking from `images` only when the next one is needed.

    Args:
        images: one photo, or any number of them; a folder or pattern stands for its photos (`find_photos`).

    Raises:
        DataError: something is no photo by its type or shape, or a folder or pattern has no photos.
    """
    number = 0
    for item in [images] if _is_one(images) else images:  # type: ignore[union-attr]
        for photo in _photos_of(item, number):
            yield photo
            number += 1


def _is_one(images: object) -> bool:
    """Whether this is one input, and not several. An array [N, H, W, C] is several photos."""
    if isinstance(images, numpy.ndarray):
        return images.ndim < 4
    is_several = isinstance(images, Iterable) and not hasattr(images, "read")
    return isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Mapping) or not is_several


def _photos_of(item: Any, number: int) -> Iterator[Photo]:
    """The photos that one input stands for; the first of them is photo `number`, counted from 0."""
    if isinstance(item, str | os.PathLike):
        yield from (Photo(str(path), path) for path in find_photos([item]).paths)
        return
    name = f"photo {number}"
    if isinstance(item, Image.Image):
        yield Photo(str(getattr(item, "filename", "") or name), item)
    elif isinstance(item, numpy.ndarray):
        yield Photo(name, _checked_array(item, name))
    elif isinstance(item, bytes | bytearray | memoryview):
        yield Photo(name, bytes(item))
    elif hasattr(item, "read"):
        yield Photo(str(getattr(item, "name", "") or name), _read_stream(item, name))
    else:
        kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
        advice = "; pass tensor.permute(1, 2, 0).cpu().numpy() as uint8" if kind == "torch.Tensor" else ""
        raise DataError(
            f"{name}: a {kind} is no photo{advice or '; pass a path, bytes, an image of Pillow or an array of numpy'}"
        )


def _checked_array(array: numpy.ndarray, name: str) -> numpy.ndarray:
    """Return an array as Pillow takes it; DataError where it could be misread."""
    shape = "x".join(map(str, array.shape))
    if array.dtype != numpy.uint8:
        scale = "array >> 8" if array.dtype == numpy.uint16 else "array * 255, for values of 0..1"
        advice = f"convert it ({scale}) and use astype('uint8')"
        raise DataError(f"{name}: an array of {array.dtype} is no photo, values must be uint8; {advice}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        if array.size == 0:
            raise DataError(f"{name}: an array of {shape} is empty")
        return array
    channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
    advice = "put the channels last: array.transpose(1, 2, 0)" if channels_first else "use HxW, HxWx3 or HxWx4"
    raise DataError(f"{name}: an array of {shape} is no photo; {advice}")


def _read_stream(stream: Any, name: str) -> bytes:
    """Read an opened image file from its beginning; the caller closes it."""
    try:
        if stream.seekable():
            stream.seek(0)
        data = stream.read()
    except (OSError, ValueError) as error:  # ValueError: closed
        raise DataError(f"{name}: cannot be read ({error})") from error
    if not isinstance(data, bytes):
        raise DataError(f"{name}: a file opened as text is no photo; open it with mode 'rb'")
    return data


def _reopened(image: Image.Image) -> Image.Image | None:
    """Open the file of an image that is not decoded yet, so that its pixels do not stay in the caller's object."""
    path = getattr(image, "filename", "")
    if not getattr(image, "tile", None) or not path or not os.path.isfile(path):
        return None
    try:
        other = Image.open(path)
    except OSError:
        return None
    is_same = (other.size, other.mode, other.format) == (image.size, image.mode, image.format)
    return other if is_same and image.tell() == 0 else None


def _files_behind(place: Path) -> list[Path] | None:
    """All files of a folder or pattern, photos or not; None for the path of a file, whether it exists or not."""
    if os.path.isdir(place):
        return list(_walk(place))
    if os.path.exists(place) or not _PATTERN & set(str(place)):
        return None
    # `**` would follow a link that leads back up, some 40 times.
    paths = (Path(match) for match in glob.glob(str(place), recursive=True))
    matches = sorted(path for path in paths if not any(_is_loop(folder) for folder in (path, *path.parents)))
    return [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, sorted, without hidden ones; a link back to a folder above is not followed."""
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        facts = os.stat(root)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_loop(Path(root, name)))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _is_loop(folder: Path) -> bool:
    """Whether this is a link to a folder that contains it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error
