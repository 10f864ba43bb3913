"""A small proof of learning: what the tiny model has seen often enough, it finds again, through the real entries."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageOps

from bbu.evaluation.detection import count_matches, headline, pair_up
from bbu.evaluation.predictions import Prediction
from bbu.inference import Qwen25VLInference
from bbu.schema import BBUObject, View, read_records
from tests.commands import call_well, make_demo

pytestmark = pytest.mark.e2e

SETTINGS = (
    "teacher_ratio=0.0", "eval_prompt=detailed", "max_steps=130", "per_device_train_batch_size=8", "warmup_steps=10",
    "vision_lr=2e-3", "merger_lr=2e-3", "llm_lr=2e-3", "save_steps=1000", "logging_steps=10", "cpu_threads=2",
)  # fmt: skip


def test_eight_photos_are_learnt_by_heart(tmp_path: Path, record_property):
    demo = make_demo(tmp_path, 8, 1, "val_ratio=0.0")
    call_well("train", *SETTINGS, *demo.settings, f"output_root={tmp_path}")
    predictor = Qwen25VLInference(tmp_path / "output-smoke" / "checkpoint-130")
    views = [record.student for record in read_records(tmp_path / "data" / "train.jsonl")]
    score = scored(predictor, tmp_path / "data", views)
    record_property("found", score)
    print(f"8 photos, {sum(len(v.objects) for v in views)} objects: {score}")
    assert score["recall"] >= 0.95 and score["precision"] >= 0.95


def scored(predictor: Qwen25VLInference, root: Path, views: list[View]) -> dict[str, float]:
    """Precision, recall and F1 at IoU 0.5 with the right label, of `predict_detection` on the views' photos."""
    images = [ImageOps.exif_transpose(Image.open(root / view.images[0])).convert("RGB") for view in views]
    boxes, captions = predictor.predict_detection(images)
    predictions = [
        Prediction(view.images[0], tuple(BBUObject(b, c) for b, c in zip(bs, cs, strict=True)))
        for view, bs, cs in zip(views, boxes, captions, strict=True)
    ]
    return headline(count_matches(pair_up(views, predictions), depth=None), iou=0.5)
