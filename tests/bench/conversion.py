"""Conversion of photos beside plain Pillow: CPU time of one core, from the vendor's file to the written photo."""

from __future__ import annotations

import functools
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from bbu.config.domains import DataConfig
from bbu.conversion import images
from bbu.conversion.labels import load_rules
from bbu.conversion.listing import list_vendor_folder
from bbu.conversion.reuse import convert_photos
from bbu.conversion.shards import convert_shard
from bbu.resize import smart_resize
from tests.bench._results import Row
from tests.conversion.vendor_folder import config_of, put, put_photo

MIN_PIXELS, MAX_PIXELS, QUALITY = 3136, 401_408, 95
"""As in configs/base_flat.yaml."""
LEAST_DB = 45
PHOTOS = (((4000, 3000), 2.0, 5.0), ((4000, 3000), 5.0, 5.0), ((1440, 1920), 3.0, 1.8))
"""(width, height), grain in levels, least ratio"""
LISTED = (1_000, 32_000, 100_000)
RERUN_PHOTOS = 300
_REMARK = "three quarters of the time are decoding, of which a smaller scale shortens only the last step"


def run() -> list[Row]:
    with TemporaryDirectory() as folder:
        photos = [measure_photo(Path(folder) / str(i), *photo) for i, photo in enumerate(PHOTOS)]
        listings = [measure_listing(Path(folder) / f"listed-{count}", count) for count in LISTED]
        return [*photos, *listings, measure_rerun(Path(folder) / "rerun")]


def measure_photo(folder: Path, size: tuple[int, int], grain: float, limit: float) -> Row:
    jpeg = draw_jpeg(size, grain)
    item = {"coordinates": [[10, 20], [500, 400]], "properties": {"标签": "BBU品牌/华为"}}
    put(folder / "vendor", "p.jpeg", jpeg)
    put(
        folder / "vendor",
        "p.json",
        json.dumps({"info": dict(zip(("width", "height"), size, strict=True)), "dataList": [item]}).encode(),
    )
    config = config_of(
        folder / "vendor", folder / "data", min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, jpeg_quality=QUALITY
    )  # fmt: skip
    photos, rules = list_vendor_folder(folder / "vendor").photos, load_rules(config)
    written = folder / "data" / config.image_folder / "p.jpeg"

    def ours() -> None:
        written.unlink(missing_ok=True)
        (result,) = convert_photos(photos, config, rules)
        assert result.outcome.photo, result.outcome.rejects

    plan = smart_resize(*size, MIN_PIXELS, MAX_PIXELS)
    target = plan.width, plan.height

    def plain_pillow() -> None:
        with Image.open(folder / "vendor/p.jpeg") as image:
            ImageOps.exif_transpose(image).resize(target, Image.Resampling.LANCZOS).save(
                folder / "peer.jpeg", quality=QUALITY
            )

    our_ms, their_ms = best_cpu_ms([ours, plain_pillow])
    decibels = decibels_from_pillow(jpeg, target)
    assert decibels >= LEAST_DB, decibels
    ratio = their_ms / our_ms
    return Row(
        f"one photo of {size[0]}x{size[1]}, {len(jpeg) / 1e6:.1f} MB, converted and checked for damage",
        f"{our_ms:.0f} ms, {decibels:.0f} dB before encoding", f"Pillow, all pixels, unchecked: {their_ms:.0f} ms",
        ratio, f"{limit}x, {LEAST_DB} dB", _REMARK if ratio < limit else "",
    )  # fmt: skip


def decibels_from_pillow(jpeg: bytes, target: tuple[int, int]) -> float:
    """PSNR of our pixels, before they are encoded, against a full decoding that Pillow resized."""
    ours = images._resample(images._decode(images._without_metadata(jpeg), target), target)
    with Image.open(io.BytesIO(jpeg)) as image:
        theirs = np.asarray(image.resize(target, Image.Resampling.LANCZOS))
    return float(10 * np.log10(255**2 / np.mean((ours - theirs.astype(np.float64)) ** 2)))


def measure_listing(folder: Path, count: int) -> Row:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:06d}.jpeg").touch()
        (folder / f"{index:06d}.json").touch()
    (milliseconds,) = best_cpu_ms([lambda: list_vendor_folder(folder)], repeats=2)
    return Row(f"listing {count:,} photos of one folder", f"{milliseconds / count:.3f} ms a photo", "", None, "flat")


def measure_rerun(folder: Path) -> Row:
    for index in range(RERUN_PHOTOS):
        put_photo(folder / "vendor", f"{index:03d}")
    config: DataConfig = config_of(folder / "vendor", folder / "data")
    convert = functools.partial(convert_shard, config, 0, 1)
    (first,) = best_cpu_ms([convert], repeats=1)
    with mock.patch("simplejpeg.decode_jpeg", side_effect=AssertionError("decoded")):
        (again,) = best_cpu_ms([convert], repeats=3)
    return Row(
        f"unchanged rerun over {RERUN_PHOTOS} small photos", f"{again / RERUN_PHOTOS:.2f} ms a photo, none decoded",
        f"first conversion {first / RERUN_PHOTOS:.2f} ms a photo", first / again, "no decoding",
    )  # fmt: skip


def best_cpu_ms(calls: Sequence[Callable[[], object]], repeats: int = 9) -> list[float]:
    """Least CPU time of each call in milliseconds; the calls take turns, so that other load meets all of them."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.process_time()
            call()
            best[index] = min(best[index], time.process_time() - start)
    return [seconds * 1000 for seconds in best]


def draw_jpeg(size: tuple[int, int], grain: float) -> bytes:
    """A photo of plain parts, edges and text, with light that varies slowly and grain of so many levels."""
    source = np.random.default_rng(0)
    clouds = source.normal(128, 40, (12, 16, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(clouds).resize(size, Image.Resampling.BICUBIC)
    draw, unit = ImageDraw.Draw(image), max(size) // 100
    for index in range(150):
        x, y, width, height = (int(v) for v in source.integers(0, (*size, 8 * unit, 8 * unit)))
        color = tuple(int(level) for level in source.integers(0, 256, 3))
        if index % 3:
            draw.rectangle((x, y, x + width, y + height), fill=color, outline=(20, 20, 20), width=unit // 6)
        else:
            draw.text((x, y), "BBU-5G 0123456789", fill=color, font_size=1 + unit + height // 4)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(unit / 40)), np.float32)
    noisy = pixels + source.normal(0, grain, pixels.shape).astype(np.float32)
    data = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()
