"""Pixels: upright, resized, free of metadata, and never from a file that does not decode to its end."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from bbu.conversion.images import _resample, make_resized, read_frame
from bbu.conversion.rejects import Unusable
from bbu.resize import ResizePlan, smart_resize

PLAN = smart_resize(800, 600, 784, 28224)


def opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def picture(orientation: int, size: tuple[int, int] = (800, 600)) -> bytes:
    """A photo whose four corners differ, with EXIF, a comment and a thumbnail-sized secret."""
    gradient = Image.merge("RGB", (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256))))
    exif = Image.Exif()
    exif[274], exif[315] = orientation, "Inventory Person"
    return jpeg(gradient.resize(size), quality=95, exif=exif, comment=b"Inventory Comment")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_written_image_is_upright_like_exif_transpose(orientation: int) -> None:
    source = picture(orientation)
    assert read_frame(source) == ((800, 600), orientation)
    upright = ImageOps.exif_transpose(opened(source)).convert("RGB")
    plan = smart_resize(*upright.size, 784, 28224)
    written = opened(make_resized(source, plan, orientation, 95))
    assert written.size == (plan.width, plan.height)
    difference = ImageChops.difference(written, upright.resize(written.size, Image.Resampling.LANCZOS))
    assert max(high for _, high in difference.getextrema()) < 16


def test_nothing_personal_is_carried_over() -> None:
    source = picture(1)
    written = make_resized(source, PLAN, 1, 95)
    assert b"Inventory" in source and b"Inventory" not in written and b"Exif" not in written


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
def test_truncated_file_is_rejected(share: float) -> None:
    source = picture(1)
    with pytest.raises(Unusable) as caught:
        make_resized(source[: int(len(source) * share)], PLAN, 1, 95)
    assert caught.value.reason == "undecodable_image" and "0x" not in caught.value.detail


def test_file_that_only_pretends_to_be_a_jpeg_is_rejected() -> None:
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "PNG")
    with pytest.raises(Unusable):
        read_frame(png.getvalue())


def test_orientation_outside_the_standard_counts_as_upright() -> None:
    assert read_frame(picture(99))[1] == 1


def test_first_picture_of_a_multi_picture_file_is_taken() -> None:
    first, second = (Image.new("RGB", (280, 280), color) for color in ("red", "blue"))
    both = io.BytesIO()
    first.save(both, "MPO", save_all=True, append_images=[second])
    assert read_frame(both.getvalue()) == ((280, 280), 1)
    written = opened(make_resized(both.getvalue(), smart_resize(280, 280, 784, 28224), 1, 95))
    assert written.convert("RGB").getpixel((80, 80)) == pytest.approx((254, 0, 0), abs=2)


def jpeg(image: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", **({"quality": 90} | options))
    return data.getvalue()


NOISE = Image.merge("RGB", [Image.effect_noise((640, 480), spread) for spread in (30, 60, 90)])
WHOLE = jpeg(NOISE)
END = b"\xff\xd9"
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00\x00"


def convert(data: bytes) -> bytes:
    return make_resized(data, smart_resize(640, 480, 784, 28224), 1, 95)


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda block, rest: bytes(len(block)),
        lambda block, rest: b"\xff" * len(block),
        lambda block, rest: random.Random(0).randbytes(len(block)),
        lambda block, rest: rest[: len(block)],
    ],
    ids=["zeros", "ones", "noise", "another part of the file"],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_picture_with_an_overwritten_block_is_rejected(options: dict, overwrite: Callable) -> None:
    data = jpeg(NOISE, **options)
    at = len(data) // 2
    block, rest = data[at : at + 4096], data[at + 4096 :]
    with pytest.raises(Unusable) as caught:
        convert(data[:at] + overwrite(block, rest) + rest)
    assert caught.value.reason in ("damaged_image", "undecodable_image")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_picture_whose_last_part_is_zeros_is_rejected_although_its_end_marker_is_there(options: dict) -> None:
    data = jpeg(NOISE, **options)
    with pytest.raises(Unusable):
        convert(data[:-5000] + bytes(4998) + END)


WHOLE_PICTURES = {
    "progressive": jpeg(NOISE, progressive=True),
    "full colour": jpeg(NOISE, subsampling=0),
    "restart markers": jpeg(NOISE, restart_marker_blocks=3),
    "CMYK": jpeg(NOISE.convert("CMYK")),
    "grey": jpeg(NOISE.convert("L")),
    "RGB": jpeg(NOISE, keep_rgb=True),
    "coarse": jpeg(NOISE, quality=2),
    "end marker in a comment": jpeg(NOISE, comment=b"x" + END),
    "film behind": WHOLE + b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)),
    "second picture behind": WHOLE + WHOLE,
    "zeros before the end marker": WHOLE[:-2] + b"\x00" * 64 + END,
    "filling before the end marker": WHOLE[:-2] + b"\xff" * 3 + END,
    "stray byte in the header": WHOLE[:20] + b"\x00" + WHOLE[20:],
    "zeros in the scan's header, as from old cameras": WHOLE.replace(b"\x00\x3f\x00", b"\x00\x00\x00", 1),
    "JFIF, and colours that Adobe's segment calls RGB": WHOLE[:20] + ADOBE_RGB + WHOLE[20:],
    "unknown JFIF version": WHOLE.replace(b"JFIF\x00\x01", b"JFIF\x00\x07"),
}


def difference_from_pillow(data: bytes, written: bytes, quality: int) -> float:
    """Root mean square, in levels, of the difference from what Pillow alone makes of the whole picture."""
    resized = opened(data).convert("RGB").resize(opened(written).size, Image.Resampling.LANCZOS)
    difference = ImageChops.difference(opened(written), opened(jpeg(resized, quality=quality)))
    return max(ImageStat.Stat(difference).rms)


@pytest.mark.parametrize("kind", WHOLE_PICTURES)
def test_whole_picture_is_kept_in_its_colours_whatever_stands_around_it(kind: str) -> None:
    assert difference_from_pillow(WHOLE_PICTURES[kind], convert(WHOLE_PICTURES[kind]), 95) < 3


SLIPS = {
    "zeros in the scan's header": lambda data: data.replace(b"\x00\x3f\x00", b"\x00\x00\x00", 1),
    "colours of unknown meaning": lambda data: re.sub(rb"(?<=Adobe.{6}).", b"\x09", data, count=1, flags=re.DOTALL),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_damage_is_found_behind_a_header_that_the_decoder_warns_of(slip: str) -> None:
    data = SLIPS[slip](jpeg(NOISE, keep_rgb=True))
    at = len(data) // 2
    assert convert(data)
    with pytest.raises(Unusable, match="Corrupt"):
        convert(data[:at] + bytes(4096) + data[at + 4096 :])


def test_damage_that_is_found_does_not_depend_on_the_scale_of_decoding() -> None:
    small, whole = ResizePlan(640, 480, 28, 28), ResizePlan(640, 480, 644, 476)
    source = random.Random(0)
    verdicts = []
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        data = jpeg(NOISE, quality=50, **options)
        for length in (1, 16, 512, 4096) * 2:
            at = source.randrange(700, len(data) - length)
            damaged = data[:at] + source.randbytes(length) + data[at + length :]
            verdicts.append([verdict(damaged, plan) for plan in (small, whole)])
    assert all(one == other for one, other in verdicts)
    assert 0 < sum(one is None for one, _ in verdicts) < len(verdicts) / 2  # a byte that only changes a colour


def verdict(data: bytes, plan: ResizePlan) -> str | None:
    """The reject of a JPEG; None for one that is kept."""
    try:
        make_resized(data, plan, 1, 95)
    except Unusable as unusable:
        return str(unusable)
    return None


@pytest.mark.parametrize("target", [(532, 392), (308, 224), (140, 112), (56, 28)])
def test_pixels_are_those_of_a_full_decoding_that_pillow_resized(target: tuple[int, int]) -> None:
    data = jpeg(NOISE.filter(ImageFilter.GaussianBlur(1)))
    written = make_resized(data, ResizePlan(640, 480, *target), 1, 100)
    assert difference_from_pillow(data, written, 100) < 255 / 10 ** (45 / 20)  # 45 dB


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1440, 1080), (532, 392)), ((300, 401), (28, 56)), ((740, 540), (728, 532)), ((733, 531), (728, 532)),
        ((90, 70), (308, 224)), ((1, 3), (56, 28)), ((57, 1), (9, 5)), ((1, 1), (28, 28)),
    ],
)  # fmt: skip
def test_resampling_moves_nothing_whatever_the_sizes(before: tuple[int, int], after: tuple[int, int]) -> None:
    """In noise, a tenth of a pixel would show: it is 7 levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (before[1], before[0], 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(after, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(_resample(pixels, after) - expected).mean() < 2


def test_a_plain_picture_keeps_its_colour() -> None:
    plain = np.full((480, 640, 3), (3, 120, 255), np.uint8)
    assert np.unique(_resample(plain, (252, 196)).reshape(-1, 3), axis=0).tolist() == [[3, 120, 255]]
