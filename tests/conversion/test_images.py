"""Pixels: upright, resized, free of metadata, and never from a file that does not decode to its end."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest
from PIL import Image, ImageChops, ImageOps

from bbu.conversion.images import make_resized, read_frame
from bbu.conversion.rejects import Unusable
from bbu.resize import smart_resize

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
    "unknown JFIF version": WHOLE.replace(b"JFIF\x00\x01", b"JFIF\x00\x07"),
}


@pytest.mark.parametrize("kind", WHOLE_PICTURES)
def test_whole_picture_is_kept_whatever_stands_around_it(kind: str) -> None:
    assert convert(WHOLE_PICTURES[kind])


def test_picture_of_thousands_of_scans_is_rejected_at_once() -> None:
    whole = jpeg(Image.new("L", (4000, 3000)), progressive=True)
    head, *scans = whole[:-2].split(b"\xff\xda")
    with pytest.raises(Unusable, match="too long to decode"):
        convert(b"\xff\xda".join([head, *scans, *scans[-1:] * 1000]) + END)
