"""Photos from disk or memory to ViT patches: full decode, EXIF orientation, the one smart_resize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.errors import DataError
from bbu.resize import ResizePlan, smart_resize


@dataclass(frozen=True)
class Pixels:
    """Images of one view. patches: [P, 1176] float32; grid: [I, 3] int64; plans: one per image."""

    patches: torch.Tensor
    grid: torch.Tensor
    plans: tuple[ResizePlan, ...]


def load_image(path: Path, name: str) -> Image.Image:
    """Decode a photo completely, upright and RGB; raises DataError naming sample and file."""
    with _opened(path, name) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_size(path: Path, name: str) -> tuple[int, int]:
    """(width, height) in pixels of the upright photo, from its header alone; raises DataError."""
    with _opened(path, name) as image:
        # Orientations 5 to 8 of the EXIF standard turn the photo by a quarter.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    if not path.is_file():
        raise DataError(f"{name}: no image {path}; convert again or correct data_root")
    try:
        with Image.open(path) as image:
            yield image
    # What Pillow raises for damaged files, SyntaxError included.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot decode {path} ({error}); replace the file and convert again") from error


class ImagePreparer:
    """Resizes by `bbu.resize` and normalises with the model's own image processor."""

    def __init__(self, processor: Qwen2VLImageProcessorPil, min_pixels: int, max_pixels: int) -> None:
        self._processor = processor
        self.merge_size = processor.merge_size
        self._limits = (min_pixels, max_pixels)

    def plan(self, width: int, height: int) -> ResizePlan:
        """How a `width` x `height` image is resized for the model."""
        return smart_resize(width, height, *self._limits)

    def prepare(self, images: Sequence[Image.Image]) -> Pixels:
        """Resize and cut into patches; a converted photo already has its size and stays as it is."""
        plans = tuple(self.plan(*image.size) for image in images)
        resized = [_resize(image, plan) for image, plan in zip(images, plans, strict=True)]
        # The processor's own resize would be a second rule; it only normalises and cuts here.
        out = self._processor(images=resized, do_resize=False, return_tensors="pt")
        return Pixels(out["pixel_values"], out["image_grid_thw"], plans)


def _resize(image: Image.Image, plan: ResizePlan) -> Image.Image:
    size = (plan.width, plan.height)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
