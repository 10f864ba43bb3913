"""The detection head: what it can see, what it cannot, and what it predicts for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from bbu.config.read import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.prompts import get_prompt
from bbu.errors import ModelError
from bbu.models.denoising import draw_denoising_queries
from bbu.models.detection_head import (
    DetectionOutput,
    _edge_distances,
    _refined_boxes,
    _self_attention_mask,
    _sine_embedding,
)
from bbu.models.qwen import BBUModel, DetectionQuery, load_image_processor, load_model, load_tokenizer
from bbu.models.tiny import build_tiny_model
from bbu.schema import BBUObject, View
from tests.models.test_denoising import TRUTH

SMALL = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=32", "detection_num_layers=2",
    "detection_num_heads=4", "detection_ffn_dim=64", "detection_adapter_dim=32",
)  # fmt: skip
SCREW, BRAND = "螺丝连接点/BBU安装螺丝/安装正确", "bbu基带处理单元/华为"


def config(*more: str):
    return load_config("smoke", overrides=[*SMALL, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("head")
    for index, colour in enumerate(("red", "green", "blue", "grey")):
        image = Image.new("RGB", (112 + 28 * index, 140), "white")
        ImageDraw.Draw(image).rectangle((10, 20 + 10 * index, 60, 90), fill=colour)
        image.save(root / f"{index}.png")
    return build_tiny_model(root / "model", seed=0).parent


@pytest.fixture(scope="module")
def model(folder: Path) -> BBUModel:
    torch.manual_seed(0)
    model = load_model(folder / "model", config().model, config().detection).eval()
    with torch.no_grad():  # a fresh head keeps every box as it is; let this one move them
        for parameter in model.detection_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def view(index: int, desc: str = SCREW) -> View:
    return View((f"{index}.png",), (BBUObject((10, 20, 60, 90), desc),))


@pytest.fixture(scope="module")
def head_output(folder: Path, model: BBUModel) -> Callable[..., DetectionOutput]:
    """The head's output for some (student, teachers) pairs in one batch."""
    tokenizer = load_tokenizer(folder / "model")
    settings = config(f"data_root={folder}")
    builder = SampleBuilder(
        settings.data, tokenizer, load_image_processor(folder / "model"), get_prompt("zh", "concise")
    )
    collate = StandardDataCollator(tokenizer.pad_token_id)

    def run(*pairs: tuple[View, tuple[View, ...]]) -> DetectionOutput:
        batch = collate([builder.build("s", student, teachers) for student, teachers in pairs])
        query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
        inputs = {
            k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        }
        with torch.no_grad():
            _, output = model(
                **inputs, use_cache=False, read_states=lambda states, head: None,
                detection=query, read_detection=lambda output, model: output,
            )  # fmt: skip
        return output

    return run


def same_bits(one: DetectionOutput, other: DetectionOutput, row: int = 0) -> bool:
    pairs = [(one.boxes[:, row], other.boxes[:, row]), (one.logits[:, row], other.logits[:, row])]
    return all(torch.equal(a, b) for a, b in [*pairs, (one.states[row], other.states[row])])


def test_the_answer_changes_nothing(head_output: Callable[..., DetectionOutput]):
    assert same_bits(head_output((view(0, SCREW), ())), head_output((view(0, BRAND), ())))


def test_another_samples_answer_changes_nothing(head_output: Callable[..., DetectionOutput]):
    assert same_bits(head_output((view(0), ()), (view(1), ())), head_output((view(0), ()), (view(1, BRAND), ())))


def test_a_teachers_picture_or_another_samples_changes_nothing(
    head_output: Callable[..., DetectionOutput], folder: Path
):
    with Image.open(folder / "1.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(folder / "turned.png")
    turned = View(("turned.png",), (BBUObject((1, 2, 30, 40), BRAND),))
    assert same_bits(head_output((view(0), (view(1),))), head_output((view(0), (turned,))))
    assert same_bits(head_output((view(0), ()), (view(1), ())), head_output((view(0), ()), (turned, ())))


def test_its_own_picture_does_change_it(head_output: Callable[..., DetectionOutput], folder: Path):
    with Image.open(folder / "0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(folder / "own.png")
    assert not same_bits(head_output((view(0), ())), head_output((View(("own.png",), ()), ())))


def test_a_smaller_picture_beside_a_bigger_one_is_seen_as_alone(head_output: Callable[..., DetectionOutput]):
    alone, together = head_output((view(0), ())), head_output((view(0), ()), (view(3), ()))
    torch.testing.assert_close(together.boxes[:, 0], alone.boxes[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logits[:, 0], alone.logits[:, 0], atol=1e-5, rtol=1e-4)


def test_shapes_and_ranges(head_output: Callable[..., DetectionOutput]):
    output = head_output((view(0), ()), (view(1), ()))
    assert output.boxes.shape == (3, 2, 20, 4) and output.logits.shape == (3, 2, 20)
    assert ((output.boxes >= 0) & (output.boxes <= 1)).all() and output.valid.all()
    assert output.boxes.dtype == output.logits.dtype == torch.float32


def test_a_picture_with_fewer_patches_than_queries_leaves_the_rest_empty(folder: Path):
    Image.new("RGB", (28, 56), "red").save(folder / "mini.png")
    settings = config(f"data_root={folder}")
    model = load_model(folder / "model", settings.model, settings.detection).eval()
    tokenizer = load_tokenizer(folder / "model")
    builder = SampleBuilder(
        settings.data, tokenizer, load_image_processor(folder / "model"), get_prompt("zh", "concise")
    )
    batch = StandardDataCollator(0)([builder.build("s", View(("mini.png",), ()))])
    query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
    inputs = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    _, output = model(**inputs, detection=query, read_detection=lambda output, model: output)
    assert (
        output.valid.sum() == 8 and torch.isfinite(output.boxes).all() and torch.isfinite(output.logits[:, :, :8]).all()
    )


def test_weights_in_bfloat16_work_and_boxes_stay_float32(folder: Path):
    settings = config(f"data_root={folder}", "torch_dtype=bfloat16")
    model = load_model(folder / "model", settings.model, settings.detection).eval()
    tokenizer = load_tokenizer(folder / "model")
    builder = SampleBuilder(
        settings.data, tokenizer, load_image_processor(folder / "model"), get_prompt("zh", "concise")
    )
    batch = StandardDataCollator(0)([builder.build("s", view(0)), builder.build("s", view(1))])
    noise = draw_denoising_queries(batch["boxes"], 8, 0.4)
    query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"], noise)
    inputs = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    _, output = model(**inputs, detection=query, read_detection=lambda output, model: output)
    assert output.boxes.dtype == output.logits.dtype == torch.float32 and torch.isfinite(output.boxes).all()
    captions = model.detection_head.captions
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    logits = model.lm_head(captions(output.states[:, 0], tokens, model.get_input_embeddings()))
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    captions.generate(output.states[:, 0], model.get_input_embeddings(), model.lm_head, end=5)


def test_a_fresh_head_expects_no_object(folder: Path):
    torch.manual_seed(1)
    model = load_model(folder / "model", config().model, config().detection)
    assert model.detection_head is not None
    for score in model.detection_head.objectness:
        assert score.bias.item() == pytest.approx(-math.log(99))


def test_a_fresh_head_is_that_of_the_seed_whatever_was_drawn_before(folder: Path):
    heads = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(3)
        torch.rand(len(heads))
        heads.append(
            load_model(folder / "model", config(f"torch_dtype={dtype}").model, config().detection).detection_head
        )
    for first, second in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(first.bfloat16(), second)


def test_the_head_travels_with_the_model_folder(model: BBUModel, folder: Path, tmp_path: Path):
    model.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    loaded = load_model(tmp_path, config().model, for_training=False)
    assert loaded.detection_head is not None
    for saved, reloaded in zip(model.detection_head.parameters(), loaded.detection_head.parameters(), strict=True):
        assert torch.equal(saved, reloaded)
    without = load_model(tmp_path, config().model, config("detection_enabled=false").detection)
    assert without.detection_head is None
    with pytest.raises(ModelError, match="its detection head has another queries"):
        load_model(tmp_path, config().model, config("detection_num_queries=30").detection)


def test_detached_memory_keeps_the_heads_gradient_from_the_model(folder: Path, head_output: Callable[..., Any]):
    settings = config(f"data_root={folder}", "detection_detach_memory=true")
    model = load_model(folder / "model", settings.model, settings.detection)
    tokenizer = load_tokenizer(folder / "model")
    builder = SampleBuilder(
        settings.data, tokenizer, load_image_processor(folder / "model"), get_prompt("zh", "concise")
    )
    batch = StandardDataCollator(0)([builder.build("s", view(0))])
    query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
    inputs = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    _, output = model(**inputs, detection=query, read_detection=lambda output, model: output)
    (output.boxes.sum() + output.logits.sum()).backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.detection_head.parameters())


def test_captions_written_with_a_cache_are_those_of_full_passes(model: BBUModel):
    torch.manual_seed(2)
    states, embed, head = torch.randn(30, 32), model.get_input_embeddings(), model.lm_head
    decoder = model.detection_head.captions
    end = int(decoder.generate(states, embed, head, end=-1)[7, 3])  # so that captions end at different lengths
    written = decoder.generate(states, embed, head, end)
    with torch.no_grad():
        logits = head(decoder(states, written, embed))
    ended = (written == end).cumsum(1) - (written == end).int() > 0
    assert len(set(ended.sum(1).tolist())) > 1
    assert torch.equal(torch.where(ended, end, logits.argmax(-1)), written)
    assert decoder.generate(states[:0], embed, head, end).shape == (0, 0)


def test_a_caption_token_does_not_see_itself_or_what_follows(model: BBUModel):
    torch.manual_seed(3)
    states, embed = torch.randn(2, 32), model.get_input_embeddings()
    tokens = torch.randint(0, 900, (2, 6))
    changed = tokens.clone()
    changed[:, 3:] = torch.randint(0, 900, (2, 3))
    one, other = (model.detection_head.captions(states, t, embed) for t in (tokens, changed))
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


# --- denoising queries ---


def test_no_matching_query_sees_a_denoising_one_and_groups_do_not_see_each_other():
    noise = draw_denoising_queries(TRUTH, queries=8, noise=0.4)
    assert noise is not None
    valid = torch.tensor([[True, True, False], [True, True, True]])
    seen = _self_attention_mask(valid, noise)[:, 0]
    assert not seen[:, :3, 3:].any()
    assert not seen[0, 0, 2] and seen[1, 0, 2]
    across = noise.group[:, None] != noise.group[None, :]
    assert not seen[:, 3:, 3:][:, across].any() and seen.diagonal(dim1=1, dim2=2).all()


def test_matching_queries_predict_the_same_with_and_without_denoising(model: BBUModel, folder: Path):
    settings = config(f"data_root={folder}")
    tokenizer = load_tokenizer(folder / "model")
    builder = SampleBuilder(
        settings.data, tokenizer, load_image_processor(folder / "model"), get_prompt("zh", "concise")
    )
    batch = StandardDataCollator(0)([builder.build("s", view(0)), builder.build("s", view(1))])
    inputs = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    outputs = []
    for noise in (None, draw_denoising_queries(batch["boxes"], 10, 0.4)):
        query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"], noise)
        with torch.no_grad():
            outputs.append(model(**inputs, detection=query, read_detection=lambda output, model: output)[1])
    torch.testing.assert_close(outputs[0].boxes, outputs[1].boxes, atol=1e-5, rtol=1e-4)
    assert outputs[1].denoised_boxes.shape == (2, 2, 10, 4) and outputs[0].denoised_boxes is None


# --- geometry ---


def test_boxes_shifted_by_nothing_stay_and_can_never_leave_the_image():
    boxes = torch.tensor([[0.5, 0.25, 0.1, 0.9], [0.0, 1.0, 0.0, 1.0]])
    torch.testing.assert_close(_refined_boxes(boxes, torch.zeros(2, 4)), boxes, atol=2e-5, rtol=0)
    moved = _refined_boxes(boxes, torch.full((2, 4), 50.0))
    assert (moved <= 1).all() and torch.isfinite(moved).all()


def test_edge_distances_are_signed_and_zero_on_the_edge():
    distances = _edge_distances(torch.tensor([[0.5]]), torch.tensor([[0.5]]), torch.tensor([[0.25, 0.5, 0.75]]))
    assert distances[0, 0, 0, 0] == 0 and distances[0, 0, 2, 1] == 0
    assert distances[0, 0, 1, 0] > 0 > distances[0, 0, 1, 1]


def test_nearby_boxes_have_nearby_places():
    base = torch.tensor([0.5, 0.5, 0.2, 0.2])
    near, far = base + 0.01, base + 0.3
    distance = [(_sine_embedding(b, 64) - _sine_embedding(base, 64)).norm() for b in (near, far)]
    assert 0 < distance[0] < distance[1] and _sine_embedding(base, 64).shape == (128,)
