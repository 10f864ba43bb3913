import pytest
import torch
from PIL import ExifTags, Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.data.images import ImagePreparer, load_image, read_size
from bbu.errors import DataError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_of_the_upright_photo(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    size = (60, 40) if orientation < 5 else (40, 60)
    assert read_size(tmp_path / "a.jpg", "a") == load_image(tmp_path / "a.jpg", "a").size == size


def test_other_colour_modes_become_rgb(tmp_path):
    Image.new("LA", (30, 30), (200, 100)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", "a").mode == "RGB"


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
