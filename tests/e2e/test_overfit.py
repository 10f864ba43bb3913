"""A small proof of learning: the tiny model detects again what it was trained on, through the real entries."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageOps

from bbu.evaluation.detection import count_matches, headline_scores, pair_up
from bbu.evaluation.matching import find_overlaps
from bbu.evaluation.metrics import Headline
from bbu.evaluation.predictions import Prediction
from bbu.inference import Qwen25VLInference
from bbu.inference.predictor import Source
from bbu.schema import BBUObject, View, read_records
from tests.commands import call_well, make_demo

pytestmark = pytest.mark.e2e

STEPS = 170
SETTINGS = (
    "teacher_ratio=0.0", f"max_steps={STEPS}",
    "per_device_train_batch_size=8", "warmup_steps=10", "vision_lr=2e-3", "merger_lr=2e-3", "llm_lr=2e-3",
    "detection_lr=2e-3", "adapter_lr=2e-3", "save_steps=1000", "logging_steps=10", "cpu_threads=2",
    "detection_enabled=true", "detection_num_queries=30", "detection_hidden_dim=128", "detection_num_layers=3",
    "detection_num_heads=4", "detection_ffn_dim=256", "detection_adapter_dim=128", "detection_dropout=0.0",
    "detection_caption_dropout=0.0", "detection_caption_max_length=24", "detection_denoising_queries=30",
)  # fmt: skip


def test_eight_photos_are_memorised_by_the_answer_and_by_the_head(tmp_path: Path):
    demo = make_demo(tmp_path, 8, 1, "val_ratio=0.0")
    call_well("train", *SETTINGS, *demo.settings, f"output_root={tmp_path}")
    predictor = Qwen25VLInference(tmp_path / "output-smoke" / f"checkpoint-{STEPS}")
    views = [record.student for record in read_records(tmp_path / "data" / "train.jsonl")]
    scores = {source: score_source(predictor, tmp_path / "data", views, source) for source in ("answer", "head")}
    print(f"8 photos, {sum(len(v.objects) for v in views)} objects: {scores}")
    assert all(score.f1 >= 0.95 for score in scores.values()), scores


def score_source(predictor: Qwen25VLInference, root: Path, views: list[View], source: Source) -> Headline:
    """Precision, recall and F1 at IoU 0.5 with the right label, of `predict_detection` on the views' photos."""
    images = [ImageOps.exif_transpose(Image.open(root / view.images[0])).convert("RGB") for view in views]
    boxes, captions = predictor.predict_detection(images, source=source)
    predictions = [
        Prediction(view.images[0], tuple(BBUObject(b, c) for b, c in zip(bs, cs, strict=True)))
        for view, bs, cs in zip(views, boxes, captions, strict=True)
    ]
    return headline_scores(count_matches(find_overlaps(pair_up(views, predictions)), class_of=str), iou=0.5)
