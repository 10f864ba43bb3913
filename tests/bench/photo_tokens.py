"""From a JPEG of 532x728 pixels to the patches of the vision tower, on one core, with the same patches bit by bit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import simplejpeg
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.data.images import ImagePreparer, load_rgb
from tests.bench._results import Row

PHOTOS, REPEATS = 16, 9
WIDTH, HEIGHT = 532, 728
"""The commonest size of a converted photo."""


def run() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_photo(Path(folder) / f"{seed}.jpg", seed) for seed in range(PHOTOS)]
        rows = measure(paths)
    torch.set_num_threads(threads)
    return rows


def measure(paths: list[Path]) -> list[Row]:
    processor = Qwen2VLImageProcessorPil()
    preparer = ImagePreparer(processor, 784, 10**6)

    def ours(path: Path) -> torch.Tensor:
        return preparer.prepare([load_rgb(path, path.name)]).patches

    def stock(path: Path) -> torch.Tensor:
        return processor(images=[Image.open(path)], do_resize=False, return_tensors="pt")["pixel_values"]

    def plain_numpy(path: Path) -> torch.Tensor:
        return cut_plainly(simplejpeg.decode_jpeg(path.read_bytes()), processor)

    for path in paths:
        assert torch.equal(ours(path), stock(path)), "the patches differ from those of transformers"
        assert torch.allclose(ours(path), plain_numpy(path), atol=1e-5)
    our_rate, stock_rate, plain_rate = photos_per_second([ours, stock, plain_numpy], paths)
    what = f"photo of {WIDTH}x{HEIGHT} to patches, one core"
    return [
        Row(
            what, f"{our_rate:.0f} photos/s", f"transformers' processor on Pillow {stock_rate:.0f} photos/s",
            our_rate / stock_rate, "120 photos/s", f"decoding alone: {decodings_per_second(paths):.0f} photos/s",
        ),
        Row(
            what, f"{our_rate:.0f} photos/s", f"plain numpy on simplejpeg {plain_rate:.0f} photos/s",
            our_rate / plain_rate, "",
        ),
    ]  # fmt: skip


def cut_plainly(image: numpy.ndarray, processor: Qwen2VLImageProcessorPil) -> torch.Tensor:
    """Patches as one would write it with numpy alone, in float32."""
    size, merge = processor.patch_size, processor.merge_size
    scale = numpy.float32(processor.rescale_factor)
    pixels = (image * scale - numpy.float32(processor.image_mean)) / numpy.float32(processor.image_std)
    rows, columns = image.shape[0] // size, image.shape[1] // size
    squares = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
    patches = squares.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    return torch.from_numpy(numpy.tile(patches, (1, 1, 1, 1, 1, 2, 1, 1)).reshape(rows * columns, -1))


def photos_per_second(calls: list[Callable[[Path], object]], paths: list[Path]) -> list[float]:
    """Photos per second of CPU time, of the fastest of some rounds in which the calls take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(REPEATS):
        for number, call in enumerate(calls):
            start = time.process_time()
            for path in paths:
                call(path)
            best[number] = min(best[number], time.process_time() - start)
    return [len(paths) / seconds for seconds in best]


def decodings_per_second(paths: list[Path]) -> float:
    return photos_per_second([lambda path: load_rgb(path, path.name)], paths)[0]


def write_photo(path: Path, seed: int) -> Path:
    """Write a photo-like JPEG: soft shapes under the noise of a sensor, about 160 kB."""
    rng = numpy.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (46, 34, 3), dtype=numpy.uint8))
    soft = numpy.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    noisy = soft + rng.normal(0, 4, soft.shape)
    Image.fromarray(noisy.clip(0, 255).astype(numpy.uint8)).save(path, quality=95)
    return path
