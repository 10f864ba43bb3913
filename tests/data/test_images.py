import io

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.data.images import ImagePreparer, load_image, load_rgb, read_size, upright_rgb
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


def photo_of(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient, so that no two rows, columns or colours are alike."""
    noise = Image.effect_noise((width, height), 60)
    return Image.merge("RGB", (noise, Image.linear_gradient("L").resize((width, height)), noise.rotate(180))).convert(
        mode
    )


@pytest.mark.parametrize("size", [(16, 16), (61, 43), (112, 84)])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": s, "progressive": p, "quality": q} for s in (0, 1, 2) for p in (False, True) for q in (40, 95)]
    + [{"restart_marker_rows": 1, "optimize": True}, {"keep_rgb": True}],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_has_the_pixels_that_pillow_decodes(tmp_path, mode, options, size):
    path = tmp_path / "a.jpg"
    photo_of(*size, mode).save(path, **options)
    assert numpy.array_equal(load_rgb(path, "a"), numpy.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 9])
def test_a_jpeg_is_turned_as_its_exif_says(tmp_path, orientation):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo_of(60, 40).save(path, exif=exif)
    assert numpy.array_equal(load_rgb(path, "a"), numpy.asarray(ImageOps.exif_transpose(Image.open(path))))


def test_a_damaged_jpeg_is_what_pillow_makes_of_it(tmp_path):
    """Cut or overwritten anywhere: the strict decoder in front of Pillow neither hides damage nor adds any."""
    buffer, path = io.BytesIO(), tmp_path / "a.jpg"
    photo_of(112, 84).save(buffer, "JPEG")
    whole, outcomes = buffer.getvalue(), set()
    for place in range(2, len(whole), len(whole) // 40):
        for data in (
            whole[:place],
            whole[:place] + b"\0" * 40 + whole[place + 40 :],
            whole[:place] + whole[place + 9 :],
        ):
            path.write_bytes(data)
            try:
                expected = numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            except (OSError, SyntaxError, ValueError):
                outcomes.add("refused")
                with pytest.raises(DataError, match="cannot decode"):
                    load_rgb(path, "a")
            else:
                outcomes.add("decoded")
                assert numpy.array_equal(load_rgb(path, "a"), expected)
    assert outcomes == {"refused", "decoded"}


@settings(max_examples=60, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    patch_and_merge=st.sampled_from([(14, 2), (14, 1), (7, 2), (7, 4), (28, 1), (4, 7)]),
    frames=st.integers(1, 3),
    mean=st.tuples(*[st.floats(-1, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 2)] * 3),
    scale=st.floats(1e-4, 1),
    steps=st.sampled_from([{}, {"do_rescale": False}, {"do_normalize": False}]),
    as_array=st.booleans(),
)
def test_patches_are_those_of_the_models_own_processor(
    sides, patch_and_merge, frames, mean, std, scale, steps, as_array
):
    """Bit by bit, whatever preprocessor_config.json says, for photos that need no resize."""
    patch, merge = patch_and_merge
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, temporal_patch_size=frames, image_mean=list(mean), image_std=list(std),
        rescale_factor=scale, **steps,
    )  # fmt: skip
    photos = [photo_of(28 * columns, 28 * rows) for columns, rows in sides]
    ours = ImagePreparer(processor, 784, 10**6).prepare([numpy.asarray(p) if as_array else p for p in photos])
    stock = processor(images=photos, do_resize=False, return_tensors="pt")
    assert torch.equal(ours.patches, stock["pixel_values"]) and ours.patches.dtype == torch.float32
    assert torch.equal(ours.grid, stock["image_grid_thw"])


def test_a_photo_of_another_size_is_resized_by_our_rule_and_cut_by_the_processors():
    processor, photo = Qwen2VLImageProcessorPil(), photo_of(130, 117)
    ours = ImagePreparer(processor, 784, 28 * 28 * 9).prepare([photo])
    resized = photo.resize((84, 56), Image.Resampling.BICUBIC)
    assert torch.equal(ours.patches, processor(images=[resized], do_resize=False, return_tensors="pt")["pixel_values"])


def test_the_grid_is_the_plans_grid_for_awkward_sizes():
    preparer = ImagePreparer(Qwen2VLImageProcessorPil(), 56 * 56, 28 * 28 * 20)
    photos = [Image.new("RGB", size) for size in [(13, 17), (999, 31), (400, 401), (28, 28)]]
    pixels = preparer.prepare(photos)
    assert [tuple(row) for row in pixels.grid.tolist()] == [plan.grid for plan in pixels.plans]
    assert len(pixels.patches) == sum(plan.placeholders * 4 for plan in pixels.plans)
