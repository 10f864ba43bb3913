"""Reads the size of a vendor's JPEG, and makes the upright, resized JPEG without any metadata."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from bbu.conversion.frames import upright_size
from bbu.conversion.rejects import Unusable
from bbu.resize import ResizePlan

_ORIENTATION_TAG = 274
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the turn that makes the picture upright."""
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_METADATA = {*range(0xE0, 0xF0), 0xFE} - {0xEE}
"""Second bytes of JPEG's APPn and COM markers (ITU-T T.81, table B.1) but Adobe's, which says how colours are coded."""
_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
"""A JFIF segment. One in a file says that three colours are YCbCr, whatever else the file says."""
_MOST_DECODED = 1_000_000_000
"""Pixels times scans: 80 scans at 12 megapixels. A progressive JPEG has about 10, any other one."""
_SEQUENTIAL_SCAN = re.compile(rb"(\xff\xda\x00(?:\x08.{3}|\x0a.{5}|\x0c.{7}|\x0e.{9})).{3}", re.DOTALL)
"""The header of a scan over 1 to 4 components (T.81, B.2.3). Its last three bytes are 0, 63, 0 in a sequential JPEG."""
_ADOBE = re.compile(rb"(Adobe.{6}).", re.DOTALL)
"""Adobe's segment, and in its last byte the meaning of the colours: 1 for YCbCr, 2 for YCCK."""
_SCALES = (8, 4, 2, 1)
"""Divisors of a size at which libjpeg-turbo decodes with vector instructions. Others, such as 5/8, take longer."""
_OVERSIZE = 2
"""How many times the target a picture is decoded at least. It keeps 52 dB against resizing all pixels of a photo with
grain, text and perforated metal; 4/3 would be faster, but keeps 39 dB of perforated metal."""
_CAMERA_PADDING, _LONGEST_FILLING = 8, 64
"""Bytes between a picture and its end marker that some encoders leave, of any value and of zeros or ones. A picture
whose end was overwritten leaves more: zeros make short blocks."""

_Pixels = NDArray[np.uint8]
_Picture = tuple[bytes, bytes]
"""The tables of a JPEG, and what begins with its first scan."""


def read_frame(jpeg: bytes) -> tuple[tuple[int, int], int]:
    """Read ((width, height) as stored, EXIF orientation 1 to 8) from the header alone. Raises Unusable."""
    with _opened(jpeg) as image:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        return image.size, orientation if orientation in TRANSPOSES else 1


def make_resized(jpeg: bytes, plan: ResizePlan, orientation: int, quality: int) -> bytes:
    """Decode all of a JPEG, turn it upright, resize it as planned and encode it again.

    Args:
        jpeg: the vendor's file.
        plan: the sizes of the upright picture before and after.
        orientation: the picture's EXIF orientation, 1 to 8.
        quality: of the JPEG that is made, 1 to 95.

    Raises:
        Unusable: the file does not decode to its end, or is damaged inside.
    """
    size = upright_size((plan.width, plan.height), orientation)  # a quarter turn is its own inverse here
    resized = Image.fromarray(_resample(_decode(_without_metadata(jpeg), size), size))
    if orientation in TRANSPOSES:
        resized = resized.transpose(TRANSPOSES[orientation])
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _decode(picture: _Picture, size: tuple[int, int], strict: bool = True) -> _Pixels:
    """Decode a picture to RGB (height, width, 3), at a smaller scale where that leaves enough for `size`.

    Pillow passes over the warnings of libjpeg, by which an overwritten part shows, and fills in grey. The scale has no
    influence on them: the whole file is read at any, and only the step from frequencies to pixels is shortened.

    Raises:
        Unusable: the decoder has an error or, if `strict`, a warning about the picture.
    """
    tables, scans = picture
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(tables + scans, strict=strict)
        stored = int(width), int(height)
        _check_work(scans, math.prod(stored))
        return _decode_colours(tables + scans, colours, _decoded_size(stored, size), strict)
    except ValueError as error:
        warning = str(error).rpartition("(): ")[2]
    if _is_filling(warning, scans):
        return _decode(picture, size, strict=False)
    mended = _mend_header(picture, warning)
    if mended != picture:
        return _decode(mended, size)
    raise Unusable("damaged_image" if warning.startswith("Corrupt") else "undecodable_image", warning)


def _decoded_size(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) that is decoded quickly and is `_OVERSIZE` times `size`; else all of `stored`."""
    sizes = [(-(-stored[0] // scale), -(-stored[1] // scale)) for scale in _SCALES]
    enough = (each for each in sizes if each[0] >= _OVERSIZE * size[0] and each[1] >= _OVERSIZE * size[1])
    return next(enough, stored)


def _decode_colours(jpeg: bytes, colours: str, least: tuple[int, int], strict: bool) -> _Pixels:
    """Decode a JPEG to RGB, at the smallest scale that leaves `least` (width, height)."""
    scale: dict[str, Any] = {"min_width": least[0], "min_height": least[1], "strict": strict}
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(jpeg, "RGB", **scale)
    inks = simplejpeg.decode_jpeg(jpeg, "CMYK", **scale)
    # Inverted, as Adobe's programs write them and Pillow reads them.
    image = Image.frombuffer("CMYK", inks.shape[1::-1], inks, "raw", "CMYK;I", 0, 1)
    return np.asarray(image.convert("RGB"))


def _resample(pixels: _Pixels, size: tuple[int, int]) -> _Pixels:
    """Resample an RGB picture (height, width, 3) to `size` (width, height) with Lanczos windows.

    libvips takes a sixth of Pillow's time, and computes in whole numbers: the bytes are the same with and without
    vector instructions. When it enlarges, it uses another filter and shifts the picture by up to half a pixel, so
    Pillow enlarges.
    """
    height, width, _ = pixels.shape
    if size[0] > width or size[1] > height:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    picture = _libvips().Image.new_from_array(pixels)
    return picture.resize(size[0] / width, vscale=size[1] / height, kernel="lanczos3").numpy()


@lru_cache(maxsize=1)
def _libvips() -> Any:
    """The binding of libvips, whose import starts the library. Its threads do not survive a fork."""
    import pyvips

    pyvips.cache_set_max(0)  # it would keep the pixels of the last hundred pictures
    pyvips.vips_lib.vips_concurrency_set(1)  # photos are converted in as many processes as there are cores
    return pyvips


def _check_work(scans: bytes, pixels: int) -> None:
    """Check that a JPEG does not go over its pixels again and again: 70 kB can keep a decoder busy for minutes."""
    data = np.frombuffer(scans, np.uint8)  # four times as fast as `bytes.count`, since a JPEG is full of 0xff
    markers = data[np.flatnonzero(data[:-1] == 0xFF) + 1]
    ends = np.flatnonzero(markers == _END_OF_IMAGE)
    count = np.count_nonzero(markers[: ends[0] if ends.size else None] == _START_OF_SCAN)
    if count * pixels > _MOST_DECODED:
        raise Unusable("undecodable_image", f"{pixels} pixels in {count} scans take too long to decode")


def _is_filling(warning: str, scans: bytes) -> bool:
    """Whether a warning is about a few bytes between a picture that is whole and its end marker."""
    stray = re.search(r"(\d+) extraneous bytes before marker 0xd9", warning)
    if stray is None:
        return False
    count, end = int(stray[1]), scans.find(b"\xff\xd9")
    return count <= _CAMERA_PADDING or (count <= _LONGEST_FILLING and not scans[end - count : end].strip(b"\0\xff"))


def _mend_header(picture: _Picture, warning: str) -> _Picture:
    """State what the decoder assumes of a header that it warns about, so that it warns of what follows."""
    tables, scans = picture
    if "SOS parameters" in warning:  # zeros, as some old cameras write them
        scans = _SEQUENTIAL_SCAN.sub(lambda match: match[1] + b"\x00\x3f\x00", scans)
    if "Adobe" in warning:  # colours of unknown meaning
        *_, colours, _ = simplejpeg.decode_jpeg_header(tables + scans, strict=False)
        tables = _ADOBE.sub(lambda match: match[1] + (b"\x02" if colours == "YCCK" else b"\x01"), tables)
    return tables, scans


def _without_metadata(jpeg: bytes) -> _Picture:
    """The tables of a JPEG, and what begins with its first scan.

    APPn and COM segments and stray bytes before the first scan are left out: the decoder warns of these too. A JFIF
    segment, of any version, becomes one of a common version.
    """
    parts, at, match = [jpeg[:2]], 2, None
    while (match := _MARKER.search(jpeg, at)) and match[1][0] != _START_OF_SCAN:
        start = match.start()
        at = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        if match[1][0] not in _METADATA:
            parts.append(jpeg[start:at])
        elif jpeg[start : start + 2] == _JFIF[:2] and jpeg[start + 4 : start + 9] == _JFIF[4:9]:
            parts.append(_JFIF)
    return b"".join(parts), jpeg[match.start() :] if match else b""


@contextmanager
def _opened(jpeg: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open a JPEG, or the first picture of a phone's multi-picture file, which Pillow opens as a JPEG too."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            yield image
    except UnidentifiedImageError as error:  # whose text is about our buffer
        raise Unusable("undecodable_image", "not a JPEG" if jpeg else "the file is empty") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unusable("undecodable_image", str(error)) from error
