"""The detection head through the real entries: frozen at first, scored on its own, queried alone or with the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bbu.inference import Qwen25VLInference
from tests.commands import Demo, call_well
from tests.tensorboard import read_scalars

pytestmark = pytest.mark.e2e

HEAD = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=64", "detection_num_layers=2",
    "detection_num_heads=4", "detection_ffn_dim=64", "detection_adapter_dim=64", "detection_denoising_queries=12",
    "detection_score_threshold=0.0", "detection_max_predictions=5", "generation_max_new_tokens=24",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training photos in batches of two: four steps an epoch. The head is frozen for the first."""
    out = tmp_path_factory.mktemp("head")
    call_well(
        "train", *demo.settings, f"output_root={out}", *HEAD, "max_steps=8", "save_steps=2",
        "save_total_limit=0", "detection_freeze_epochs=1.0",
    )  # fmt: skip
    return out / "output-smoke"


def head_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "detection_head" / "model.safetensors")


def test_a_frozen_head_keeps_every_bit_and_learns_afterwards(run: Path):
    first, second, later = (head_weights(run / f"checkpoint-{step}") for step in (2, 4, 6))
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], later[name])]
    assert len(changed) > 0.9 * len(first)
    curve = read_scalars(run)
    assert curve["lr/detection"][3] == 0 and curve["lr/detection"][6] > 0
    assert {"bbox_l1_loss", "bbox_giou_loss", "objectness_loss", "caption_loss"} <= curve.keys()


def test_answer_head_and_both_are_scored_with_their_sources_named(run: Path):
    report = call_well("eval", arguments=("--checkpoint", str(run / "checkpoint-8"))).out
    scores = {
        metrics["source"]: metrics
        for metrics in (json.loads(path.read_text()) for path in run.glob("eval/checkpoint-8/*/metrics.json"))
    }
    assert set(scores) == {"answer", "head", "both"} and report.count("run folder:") == 3
    assert scores["head"]["average_precision"]["score_source"] == "objectness"
    assert scores["head"]["images"]["objects_predicted"] <= 4 * 5


@pytest.mark.parametrize("source", ["answer", "head", "both"])
def test_predict_detection_queries_any_source(run: Path, demo: Demo, source: str):
    predictor = Qwen25VLInference(run / "checkpoint-8")
    paths = sorted((demo.root / "vendor").glob("*.jpeg"))[:2]
    images = [Image.open(path).convert("RGB") for path in paths]
    boxes, captions = predictor.predict_detection(images, source=source)
    assert len(boxes) == len(captions) == 2 and [len(b) for b in boxes] == [len(c) for c in captions]
    if source == "head":
        assert boxes[0] and all(
            0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
            for image, image_boxes in zip(images, boxes, strict=True)
            for x1, y1, x2, y2 in image_boxes
        )


def test_worked_examples_come_before_the_photo_on_request(run: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch):
    guided, alone = (
        Qwen25VLInference(run / "checkpoint-8", num_teacher_samples=2),
        Qwen25VLInference(run / "checkpoint-8"),
    )
    lengths = []
    for predictor in (guided, alone):
        stock = predictor._collate
        monkeypatch.setattr(predictor, "_collate", lambda s, stock=stock: lengths.append(len(s[0].images)) or stock(s))
        predictor.predict([Image.open(sorted((demo.root / "vendor").glob("*.jpeg"))[0])], source="head")
    assert lengths == [3, 1]


def test_a_model_without_a_head_says_so(demo: Demo, entry, tmp_path: Path):
    call_well("train", *demo.settings, f"output_root={tmp_path}", "max_steps=1", "save_steps=1")
    done = entry("eval", arguments=("--checkpoint", str(tmp_path / "output-smoke/checkpoint-1"), "--source", "head"))
    assert done.code == 4 and "no detection head" in done.err, done.err
