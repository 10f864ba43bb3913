"""The predictor on a real, tiny Qwen2.5-VL that has memorised one photo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from bbu.config.read import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.prompts import get_prompt
from bbu.inference.predictor import MODEL_KEYS, Predictor
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer
from bbu.models.tiny import build_tiny_model
from bbu.schema import BBUObject, View

OBJECTS = (BBUObject((8, 12, 60, 70), "bbu基带处理单元/华为"), BBUObject((90, 100, 140, 150), "标签贴纸"))


def draw_photo() -> Image.Image:
    image = Image.new("RGB", (168, 168), "grey")
    ImageDraw.Draw(image).rectangle((8, 12, 60, 70), fill="red")
    return image


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, data root) after 60 steps on the one photo."""
    root = tmp_path_factory.mktemp("data")
    draw_photo().save(root / "a.png")
    folder = build_tiny_model(root / "model", seed=0)
    config = load_config("smoke", overrides=[f"data_root={root}"])
    tokenizer = load_tokenizer(folder)
    prompt = get_prompt(config.language, config.eval_prompt)
    builder = SampleBuilder(config.data, tokenizer, load_image_processor(folder), prompt)
    batch = StandardDataCollator(tokenizer.pad_token_id)([builder.build("a", View(("a.png",), OBJECTS))])
    model = load_model(folder, config.model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        loss = model(**{key: batch[key] for key in MODEL_KEYS}, labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder, root


def test_boxes_come_back_in_pixels_of_the_given_image(trained: tuple[Path, Path]):
    folder, root = trained
    config = load_config("smoke", overrides=[f"data_root={root}", "generation_max_new_tokens=96"])
    predictor = Predictor(folder, config.model, config.data, config.detection)
    boxes, captions = predictor.predict_detection([draw_photo(), draw_photo()])
    assert boxes == [[o.bbox_2d for o in OBJECTS]] * 2
    assert captions == [[o.desc for o in OBJECTS]] * 2


def test_an_answer_cut_at_the_token_limit_is_reported_as_truncated(trained: tuple[Path, Path]):
    folder, root = trained
    config = load_config("smoke", overrides=[f"data_root={root}", "generation_max_new_tokens=12"])
    (answer,) = Predictor(folder, config.model, config.data, config.detection).predict([draw_photo()])
    assert (answer.status, answer.objects) == ("truncated", ())
