"""Photos from disk or memory to ViT patches: decoded completely, turned upright, resized by `bbu.resize`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.boxes import TURNED_A_QUARTER
from bbu.errors import DataError
from bbu.resize import ResizePlan, smart_resize

RgbImage = Image.Image | numpy.ndarray
"""An upright RGB image: Pillow's, or an array [H, W, 3] of uint8, with H rows of W pixels."""


@dataclass(frozen=True)
class Pixels:
    """The images of one view as the vision tower takes them. I images with P patches together."""

    patches: torch.Tensor
    """[P, 1176] float32: normalised values of each patch, 3 colours x 2 frames x 14 x 14 pixels."""
    grid: torch.Tensor
    """[I, 3] int64: (time, rows, columns) of each image in patches."""
    plans: tuple[ResizePlan, ...]
    """How each image was resized."""


def load_image(path: Path, name: str) -> Image.Image:
    """Decode a photo completely, upright and in RGB; as `load_rgb`, for those who need an image of Pillow."""
    return Image.fromarray(load_rgb(path, name))


def load_rgb(path: Path, name: str) -> numpy.ndarray:
    """Decode a photo completely, upright and in RGB.

    Args:
        path: the photo.
        name: of the sample, for messages.

    Returns:
        [H, W, 3] uint8, with H rows of W pixels.

    Raises:
        DataError: the file is missing or damaged.
    """
    with _damage_reported(path, name):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            pixels = _decode_upright_jpeg(data, image)
            return numpy.asarray(upright_rgb(image)) if pixels is None else pixels


def _decode_upright_jpeg(data: bytes, image: Image.Image) -> numpy.ndarray | None:
    """Decode a colour JPEG that is upright as it is stored: the pixels of Pillow's decoding, without its three copies.

    Args:
        data: the file.
        image: the same file, opened by Pillow and not decoded yet.

    Returns:
        [H, W, 3] uint8; None for everything else, and where the decoder so much as warns: there Pillow decides what is
        damage.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.format != "JPEG" or image.mode != "RGB" or orientation != 1:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of any mode, turn it upright as its EXIF says, and convert it to 8-bit RGB.

    Transparent parts become white. Of 16 bits the upper 8 are taken.

    Raises:
        DataError: the pixels are floating-point numbers, or whole numbers beyond 16 bits.
        Exception: whatever Pillow raises for damaged files.
    """
    image = ImageOps.exif_transpose(image)  # a copy in any case
    if image.mode == "F":
        raise DataError("the pixels are floating-point numbers, whose range is unknown; convert them to 8 bits")
    if image.mode.startswith("I"):
        return _upper_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        photo = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image of mode I;16 (any byte order) or I to grey; 32-bit pixels up to 255 stay as they are."""
    pixels = numpy.asarray(image)
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > 65535:
        raise DataError(f"the pixels range from {low} to {high}; convert them to 8 bits")
    eight_bits = image.mode == "I" and high <= 255
    return Image.fromarray((pixels if eight_bits else pixels >> 8).astype(numpy.uint8))


def read_size(path: Path, name: str) -> tuple[int, int]:
    """(width, height) in pixels of the upright photo, from its header alone.

    Args:
        path: the photo.
        name: of the sample, for messages.

    Raises:
        DataError: the file is missing or damaged.
    """
    with _damage_reported(path, name), Image.open(path) as image:
        # Pillow states the upright size of a TIFF by itself.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED_A_QUARTER
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _damage_reported(path: Path, name: str) -> Iterator[None]:
    """Turn whatever reading an image raises into a DataError that names the sample and the file."""
    if not path.is_file():
        raise DataError(f"{name}: no image {path}; convert again or correct data_root")
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{name}: cannot decode {path} ({describe_damage(error)}); replace the file and convert again"
        ) from error


def describe_damage(error: Exception) -> str:
    """Say in one line what decoding an image raised.

    Pillow raises exceptions of many types for damaged files: OSError, SyntaxError, ValueError, struct.error and more.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):  # its text has the address of a file in memory
        text = "not an image, or damaged at its beginning"
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"


class ImagePreparer:
    """Resizes images by `bbu.resize`, and makes of them the patches that the model's image processor would make.

    Equal to `Qwen2VLImageProcessorPil` bit by bit, in a quarter of its time: an 8-bit colour has 256 values, so each is
    normalised once, and one copy cuts the image into patches.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil, min_pixels: int, max_pixels: int) -> None:
        self.merge_size = processor.merge_size
        self._patch_size, self._frames = processor.patch_size, processor.temporal_patch_size
        self._values = _normalised_values(processor)
        self._limits = (min_pixels, max_pixels)

    @property
    def settings(self) -> tuple[int, ...]:
        """All that the number of an image's patches depends on, but for its size."""
        return (*self._limits, self._patch_size, self.merge_size)

    def plan(self, width: int, height: int) -> ResizePlan:
        """Plan how an image of `width` x `height` pixels is resized for the model."""
        return smart_resize(width, height, *self._limits)

    def prepare(self, images: Sequence[RgbImage]) -> Pixels:
        """Resize images and cut them into patches; a converted photo has its final size already and is not resized."""
        plans = tuple(self.plan(*size_of(image)) for image in images)
        grid = [(1, plan.height // self._patch_size, plan.width // self._patch_size) for plan in plans]
        counts = [rows * columns for _, rows, columns in grid]
        patches = torch.empty(sum(counts), len(self._values) * self._frames * self._patch_size**2)
        for image, plan, part in zip(images, plans, patches.split(counts), strict=True):
            self._write_patches(_resize(image, plan), part)
        return Pixels(patches, torch.tensor(grid), plans)

    def _write_patches(self, image: numpy.ndarray, patches: torch.Tensor) -> None:
        """Normalise an image [H, W, 3] and write its patches [P, 1176], square by square of merge_size x merge_size."""
        height, width, colours = image.shape
        size, merge = self._patch_size, self.merge_size
        rows, columns = height // size // merge, width // size // merge  # of squares
        planes = numpy.empty((colours, height, width), numpy.float32)
        for colour, values in enumerate(self._values):
            # "clip" never clips here; the default mode would go through one more buffer.
            numpy.take(values, image[:, :, colour], out=planes[colour], mode="clip")
        squares = torch.from_numpy(planes).view(colours, rows, merge, size, columns, merge, size)
        squares = squares.permute(1, 4, 2, 5, 0, 3, 6)  # row and column of squares, then in the square, colour, pixels
        target = patches.view(rows, columns, merge, merge, colours, self._frames, size, size)
        target.copy_(squares.unsqueeze(5))  # a photo is a film that stands still: all frames of a patch are equal


def size_of(image: RgbImage) -> tuple[int, int]:
    """(width, height) of an image in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _normalised_values(processor: Qwen2VLImageProcessorPil) -> numpy.ndarray:
    """[3, 256] float32: what the image processor makes of each 8-bit value of each colour, by its own arithmetic."""
    values = numpy.tile(numpy.arange(256, dtype=numpy.uint8), (3, 1, 1))  # an image of three colours and one row
    if processor.do_rescale:
        values = processor.rescale(values, processor.rescale_factor)
    if processor.do_normalize:
        values = processor.normalize(values, processor.image_mean, processor.image_std)
    return numpy.ascontiguousarray(values[:, 0], numpy.float32)


def _resize(image: RgbImage, plan: ResizePlan) -> numpy.ndarray:
    size = (plan.width, plan.height)
    if size_of(image) == size:
        return numpy.asarray(image)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return numpy.asarray(picture.resize(size, Image.Resampling.BICUBIC))
