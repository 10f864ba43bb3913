"""Plain supervised fine-tuning with transformers.Trainer, as one would write it without this project.

    python -m tests.bench._stock_sft FOLDER CPU_MINUTES SETTING…

The same tiny model, records, prompts and conversations; padded batches, one learning rate, the model's own loss.
Stops at the CPU time; writes FOLDER/stock and its metrics.json, scored outside that time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from bbu.config.label_files import load_label_scheme
from bbu.config.read import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.data.images import load_image
from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.predictions import Prediction
from bbu.inference.predictor import Predictor
from bbu.models.qwen import load_image_processor, load_tokenizer
from bbu.schema import read_records

MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
BATCH, RATE, STEPS = 8, 1e-3, int(os.environ.get("BBU_BENCH_STOCK_STEPS", "3200"))


class CpuTimeLimit(TrainerCallback):
    """Stops the training after a CPU time."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or time.process_time() > self.seconds


def main(folder: str, minutes: str, *settings: str) -> None:
    config = load_config("smoke", overrides=settings)
    torch.set_num_threads(config.infrastructure.cpu_threads)
    out, source = Path(folder) / "stock", config.model.model_path
    tokenizer, processor = load_tokenizer(source), load_image_processor(source)
    dataset = load_dataset(config.data, tokenizer, processor, split="train", seed=1, max_length=2048)
    pad = StandardDataCollator(tokenizer.pad_token_id)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=50, logging_steps=50, save_strategy="no", report_to="none",
        remove_unused_columns=False, use_cpu=True, weight_decay=0.01, optim="adamw_torch",
    )  # fmt: skip
    Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda samples: {k: v for k, v in pad(samples).items() if k in MODEL_INPUTS},
        callbacks=[CpuTimeLimit(float(minutes))],
    ).train()
    spent = time.process_time() / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)
    (out / "metrics.json").write_text(json.dumps(score(out, config) | {"cpu_minutes": spent}), encoding="utf-8")


def score(folder: Path, config) -> dict:
    root = Path(config.data.data_root)
    views = [record.student for record in read_records(root / config.data.val_file)]
    predictor = Predictor(folder, config.model, config.data, config.detection)
    detections = predictor.predict([load_image(root / view.images[0], "bench") for view in views])
    predictions = [Prediction(v.images[0], d.objects, status=d.status) for v, d in zip(views, detections, strict=True)]
    return asdict(evaluate_predictions(views, predictions, load_label_scheme(config.data), resamples=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
