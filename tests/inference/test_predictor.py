"""The predictor on a real, tiny Qwen2.5-VL that has memorised one photo."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image

from bbu.config.read import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.prompts import get_prompt
from bbu.errors import CheckpointError, DataError, ModelError
from bbu.inference.predictor import Detections, Predictor, Qwen25VLInference
from bbu.models.detection_head import DetectionOutput
from bbu.models.qwen import MODEL_INPUTS, load_image_processor, load_model, load_tokenizer
from bbu.models.tiny import build_tiny_model
from bbu.run.checkpoints import MANIFEST
from bbu.schema import BBUObject, View
from tests.inference.conftest import draw_photo

OBJECTS = (BBUObject((8, 12, 60, 70), "bbu基带处理单元/华为"), BBUObject((90, 100, 140, 150), "标签贴纸"))


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
        loss = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}, labels=batch["labels"]).loss
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


def test_an_answer_may_end_with_any_of_the_models_end_tokens(trained: tuple[Path, Path]):
    folder, root = trained
    config = load_config("smoke", overrides=[f"data_root={root}", "generation_max_new_tokens=96"])
    predictor = Predictor(folder, config.model, config.data, config.detection)
    # The model writes <|endoftext|> where it has learnt to write <|im_end|>.
    ends = load_tokenizer(folder).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    weight = predictor._model.lm_head.weight.detach().clone()
    weight[ends] = weight[ends[::-1]]
    predictor._model.lm_head.weight = torch.nn.Parameter(weight)
    (answer,) = predictor.predict([draw_photo()])
    assert (answer.status, answer.objects) == ("ok", OBJECTS)


def test_a_photo_of_a_phone_gives_the_boxes_of_the_upright_photo(trained: tuple[Path, Path]):
    folder, root = trained
    config = load_config("smoke", overrides=[f"data_root={root}", "generation_max_new_tokens=96"])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    draw_photo().transpose(Image.Transpose.ROTATE_90).save(root / "phone.png", exif=exif)
    predictor = Predictor(folder, config.model, config.data, config.detection)
    upright = [o.bbox_2d for o in OBJECTS]
    boxes, _ = predictor.predict_detection([Image.open(root / "phone.png"), root / "phone.png"])
    assert boxes == [upright, upright]
    (detections,) = predictor.predict([Image.open(root / "phone.png")])
    assert [item.bbox_2d for item in detections.objects] == upright


@pytest.fixture(scope="module")
def predictor(published: Path) -> Qwen25VLInference:
    return Qwen25VLInference(published, device="cpu")


def test_the_head_is_queried_where_there_is_one_and_that_is_said_once(published: Path, photos: Path, capsys):
    predictor = Qwen25VLInference(published, device="cpu")
    pair = predictor.predict_detection(photos / "a.png")
    assert [result.source for result in pair.results] == ["head"] and len(pair.boxes) == len(pair.captions) == 1
    assert "detection head" in capsys.readouterr().err
    predictor.predict_detection(photos / "a.png")
    assert capsys.readouterr().err == ""
    answered = predictor.predict_detection(photos / "a.png", source="answer")
    assert [(result.source, result.status) for result in answered.results] == [("answer", "truncated")]
    assert capsys.readouterr().err.startswith("bbu.inference: 1 photos: 1 truncated")


NEAR_EACH_OTHER = ((0.30, 0.30, 0.2, 0.2), (0.31, 0.30, 0.2, 0.2), (0.30, 0.29, 0.2, 0.2))
"""Centres and sizes, as shares of the image."""
APART = ((0.7, 0.7, 0.1, 0.1), (0.2, 0.8, 0.1, 0.1), (0.8, 0.2, 0.1, 0.1), (0.9, 0.9, 0.1, 0.1), (0.5, 0.1, 0.1, 0.1))


@pytest.fixture
def scripted(predictor: Qwen25VLInference, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qwen25VLInference]:
    """A predictor whose head detects these boxes, each with the caption `part`."""

    def write_script(module: object, arguments: object, output: DetectionOutput) -> DetectionOutput:
        boxes = torch.tensor(NEAR_EACH_OTHER + APART).expand_as(output.boxes)
        logits = torch.tensor([0.6, 0.7, 0.5, 0.9, 0.3, 0.2, 0.1, 0.1]).logit().expand_as(output.logits)
        return dataclasses.replace(output, boxes=boxes, logits=logits)

    hook = predictor._model.detection_head.register_forward_hook(write_script)
    monkeypatch.setattr(predictor, "_decode_captions", lambda states: ["part"] * len(states))
    yield predictor
    hook.remove()


def scores_of(predictor: Qwen25VLInference, **options: Any) -> list[float]:
    (detections,) = predictor.predict([draw_photo()], **options)
    return [round(score, 2) for score in detections.scores]


def test_a_part_is_reported_once_and_the_limit_counts_parts(scripted: Qwen25VLInference):
    assert scores_of(scripted, source="head") == [0.9, 0.7, 0.3]
    assert scores_of(scripted, source="head", min_score=0.5) == [0.9, 0.7]


def test_both_are_the_heads_finds_and_weaker_ones_that_the_answer_names_alike(
    scripted: Qwen25VLInference, monkeypatch: pytest.MonkeyPatch
):
    named = BBUObject((0.15 * 168, 0.75 * 168, 0.25 * 168, 0.85 * 168), "part")  # the find that scores 0.3
    elsewhere = BBUObject((0, 0, 20, 20), "part")
    answer = Detections((named, elsewhere), (0.5, 0.9), "coordinate_probability", (168, 168))
    monkeypatch.setattr(scripted, "_query_answer", lambda samples, batch: [answer for _ in samples])
    assert scores_of(scripted, source="both", min_score=0.5) == [0.9, 0.7, 0.65]


def test_without_a_head_the_answer_is_queried(trained: tuple[Path, Path], capsys):
    folder, root = trained
    config = load_config("smoke", overrides=[f"data_root={root}", "generation_max_new_tokens=4"])
    predictor = Predictor(folder, config.model, config.data, config.detection)
    assert [result.source for result in predictor.predict_detection(draw_photo()).results] == ["answer"]
    assert "no detection head" in capsys.readouterr().err
    with pytest.raises(ModelError, match="no detection head; use source answer"):
        predictor.stream_results(draw_photo(), source="head")


def test_a_photo_that_cannot_be_read_does_not_end_the_others(predictor: Qwen25VLInference, photos: Path, capsys):
    boxes, captions = pair = predictor.predict_detection(photos)
    assert [result.status for result in pair.results] == ["ok", "failed", "ok", "ok"]
    assert boxes[1] == captions[1] == [] and boxes[0] == boxes[2] == boxes[3] != []
    assert "b.png: cannot be read" in str(pair.results[1].error)
    error = capsys.readouterr().err
    assert "b.png: cannot be read" in error and "4 photos: 3 ok, 1 failed" in error


def test_where_no_photo_can_be_read_there_is_an_error(predictor: Qwen25VLInference, photos: Path):
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        predictor.predict_detection(photos / "b.png")
    with pytest.raises(DataError, match=r"\(and 1 other photos\)$"):
        predictor.predict_detection(["absent.jpg", photos / "b.png"])
    assert predictor.predict_detection([]) == ([], [])


def test_photos_are_taken_batch_by_batch_and_not_kept(predictor: Qwen25VLInference):
    taken: list[int] = []

    def images() -> Iterator[Image.Image]:
        for number in range(5):
            taken.append(number)
            yield draw_photo()

    results = predictor.stream_results(images())
    assert taken == []
    first = next(results)
    assert taken == [0, 1], "a batch of two" and first.draw()
    assert [result.photo for result in predictor.predict_detection(images()).results] == [None] * 5
    assert all(result.draw() for result in predictor.predict_detection([draw_photo()]).results)


def test_an_empty_prompt_and_more_examples_than_there_are_are_refused(
    predictor: Qwen25VLInference, published: Path, trained: tuple[Path, Path]
):
    with pytest.raises(DataError, match="the prompt is empty"):
        predictor.predict_detection(draw_photo(), " ")
    root = trained[1]
    (root / "pool.jsonl").touch()
    settings = [f"data_root={root}", "teacher_file=pool.jsonl"]
    for count in (-1, 1):
        with pytest.raises(DataError, match="the pool has 0"):
            Qwen25VLInference(published, overrides=settings, num_teacher_samples=count)


WEIGHTS = ("model.safetensors", "detection_head/model.safetensors")


@pytest.mark.parametrize("name", [*WEIGHTS, "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_refused_with_the_files_name(published: Path, tmp_path: Path, name: str):
    copy = Path(shutil.copytree(published, tmp_path / "checkpoint-1"))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} has changed since it was saved"):
        Qwen25VLInference(copy)


def test_a_copy_under_another_name_and_one_without_a_manifest_are_used(published: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(published, tmp_path / "best"))
    Qwen25VLInference(copy, device="cpu")
    assert capsys.readouterr().err == ""
    (copy / MANIFEST).unlink()
    Qwen25VLInference(copy, device="cpu")
    assert "not verified" in capsys.readouterr().err


def test_a_run_folder_in_place_of_a_checkpoint_names_its_newest(published: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="name checkpoint-1 in it"):
        Qwen25VLInference(published.parent)
    with pytest.raises(CheckpointError, match=r"name a checkpoint-\{step\} folder"):
        Qwen25VLInference(tmp_path)
