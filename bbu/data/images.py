"""Photos from disk or memory to ViT patches: decoded completely, turned upright, resized by `bbu.resize`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.boxes import TURNED_A_QUARTER
from bbu.errors import DataError
from bbu.resize import ResizePlan, smart_resize


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
    """Decode a photo completely, upright and in RGB.

    Args:
        path: the photo.
        name: of the sample, for messages.

    Raises:
        DataError: the file is missing or damaged.
    """
    with _opened_image(path, name) as image:
        return upright_rgb(image)


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
    with _opened_image(path, name) as image:
        # Pillow states the upright size of a TIFF by itself.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED_A_QUARTER
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _opened_image(path: Path, name: str) -> Iterator[Image.Image]:
    if not path.is_file():
        raise DataError(f"{name}: no image {path}; convert again or correct data_root")
    try:
        with Image.open(path) as image:
            yield image
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
    """Resizes images by `bbu.resize` and normalises them with the model's image processor."""

    def __init__(self, processor: Qwen2VLImageProcessorPil, min_pixels: int, max_pixels: int) -> None:
        self._processor = processor
        self.merge_size = processor.merge_size
        self._limits = (min_pixels, max_pixels)

    def plan(self, width: int, height: int) -> ResizePlan:
        """Plan how an image of `width` x `height` pixels is resized for the model."""
        return smart_resize(width, height, *self._limits)

    def prepare(self, images: Sequence[Image.Image]) -> Pixels:
        """Resize images and cut them into patches; a converted photo has its final size already and is not resized."""
        plans = tuple(self.plan(*image.size) for image in images)
        resized = [_resize(image, plan) for image, plan in zip(images, plans, strict=True)]
        # The processor normalises and cuts only: its own resize would be a second rule beside `bbu.resize`.
        out = self._processor(images=resized, do_resize=False, return_tensors="pt")
        return Pixels(out["pixel_values"], out["image_grid_thw"], plans)


def _resize(image: Image.Image, plan: ResizePlan) -> Image.Image:
    size = (plan.width, plan.height)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
