import numpy
import pytest
import torch
from PIL import ExifTags, Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.data.images import ImagePreparer, load_image, read_size, upright_rgb
from bbu.errors import DataError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_of_the_upright_photo(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    size = (60, 40) if orientation < 5 else (40, 60)
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
        assert read_size(tmp_path / name, "a") == load_image(tmp_path / name, "a").size == size


def grey_image(mode: str) -> Image.Image:
    """An opaque grey of about 200 of 255 in any mode."""
    if mode.startswith("I;16"):
        return Image.fromarray(numpy.full((30, 30), 200 << 8, ">u2" if mode.endswith("B") else "<u2"))
    if mode == "I":
        return Image.new("I", (30, 30), 200 << 8)
    between = {"HSV": "RGB", "YCbCr": "RGB", "La": "LA"}.get(mode, "L")
    return Image.new("L", (30, 30), 200).convert(between).convert(mode)


@pytest.mark.parametrize(
    "mode", ["L", "LA", "La", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I"]
)
def test_the_same_grey_in_any_mode_is_the_same_rgb(mode):
    image = upright_rgb(grey_image(mode))
    assert image.mode == "RGB" and all(abs(value - 200) <= 1 for value in image.getpixel((0, 0)))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (30, 30), 0)
    image.putpalette([10, 20, 30])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    "image",
    [Image.new("RGBA", (30, 30), (0, 0, 0, 0)), Image.new("LA", (30, 30), (0, 0)), palette_with_transparency()],
    ids=lambda image: image.mode,
)
def test_what_is_transparent_is_white(image):
    assert upright_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000), ("I", -1)])
def test_pixels_of_unknown_range_are_refused(mode, value):
    image = Image.new(mode, (9, 9), value)
    with pytest.raises(DataError, match="convert them to 8 bits"):
        upright_rgb(image)


@pytest.mark.parametrize("read", [load_image, read_size])
def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path, read):
    (tmp_path / "a.jpg").write_bytes(b"not a photo")
    with pytest.raises(DataError, match=r"sample 3: cannot decode .*a\.jpg") as error:
        read(tmp_path / "a.jpg", "sample 3")
    assert "\n" not in str(error.value)


def test_patches_are_those_of_the_models_own_processor():
    """A photo that needs no resize is cut exactly as the stock processor cuts it."""
    processor, photo = Qwen2VLImageProcessorPil(), Image.effect_noise((140, 112), 60).convert("RGB")
    ours = ImagePreparer(processor, 784, 10**6).prepare([photo])
    stock = processor(images=[photo], return_tensors="pt")
    assert torch.equal(ours.patches, stock["pixel_values"])
    assert torch.equal(ours.grid, stock["image_grid_thw"])


def test_the_grid_is_the_plans_grid_for_awkward_sizes():
    preparer = ImagePreparer(Qwen2VLImageProcessorPil(), 56 * 56, 28 * 28 * 20)
    photos = [Image.new("RGB", size) for size in [(13, 17), (999, 31), (400, 401), (28, 28)]]
    pixels = preparer.prepare(photos)
    assert [tuple(row) for row in pixels.grid.tolist()] == [plan.grid for plan in pixels.plans]
    assert len(pixels.patches) == sum(plan.placeholders * 4 for plan in pixels.plans)
