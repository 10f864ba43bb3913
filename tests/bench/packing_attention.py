"""A packed row under sdpa beside the same samples as a padded batch of the stock model: training steps on one core."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.read import load_config
from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.data.types import Sample, Span
from bbu.losses.language import find_supervision, language_sums
from bbu.models.qwen import MODEL_INPUTS, BBUModel, load_model
from bbu.models.tiny import build_tiny_model
from bbu.schema import IGNORE_INDEX
from tests.bench._results import Row

SAMPLES = 5
"""Samples in a row: a packed row of 8,192 tokens holds about five of the real photos' conversations."""
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_hidden_layers": 2}
"""A wider language model, in which attention takes a smaller share of the time, as in the real one."""
CASES: tuple[tuple[str, dict[str, int], int], ...] = (
    ("tiny model", {}, 1024), ("tiny model", {}, 4096), ("tiny model", {}, 8192), ("4x wider model", WIDE, 4096),
)  # fmt: skip
"""(name, changes of the tiny model's text config, tokens of a row)"""
IMAGE_TOKEN_SHARE = 0.6
REPEATS = 3

_Step = Callable[[], float]


def run() -> list[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return [measure(Path(folder), *case) for case in CASES]


def measure(root: Path, name: str, changes: dict[str, int], tokens: int) -> Row:
    folder = build_model(root / f"{name}-{tokens}", changes)
    samples = draw_samples(tokens)
    padded, packed = StandardDataCollator(0)(samples), PackedDataCollator(0, max_total_length=tokens)(samples)
    ours = load_model(folder, load_config("smoke", overrides=["gradient_checkpointing=false"]).model)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    steps = {"ours": training_step(ours, packed), "padded": training_step(stock, padded)}
    steps["block mask"] = training_step(stock, packed)
    seconds = best_seconds(steps)
    real = sum(len(sample) for sample in samples)
    rate = {key: real / value for key, value in seconds.items()}
    return Row(
        f"{name}, {SAMPLES} samples of {min(map(len, samples))} to {max(map(len, samples))} tokens in a row",
        f"{rate['ours']:,.0f} tokens/s",
        f"stock model, padded batch {rate['padded']:,.0f} tokens/s (the same row under its block mask "
        f"{rate['block mask']:,.0f})",
        rate["ours"] / rate["padded"],
        "1.5x",
    )


def build_model(folder: Path, changes: dict[str, int]) -> Path:
    """Write the tiny model, with another text config where there are changes."""
    build_tiny_model(folder, seed=0)
    if changes:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        config: Any = model.config
        for key, value in changes.items():
            setattr(config.text_config, key, value)
        config.text_config.layer_types = config.text_config.layer_types[: config.text_config.num_hidden_layers]
        half = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
        config.text_config.rope_parameters["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
        config.vision_config.out_hidden_size = config.text_config.hidden_size
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def draw_samples(tokens: int) -> list[Sample]:
    """Samples of 0.5 to 1.4 times their mean length that fill a row; the same at every call."""
    lengths = [int(tokens / SAMPLES * share) for share in (0.5, 1.4, 0.8, 1.25, 1.05)]
    torch.manual_seed(0)
    random.seed(0)
    return [draw_sample(f"sample {i}", length) for i, length in enumerate(lengths)]


def draw_sample(name: str, length: int) -> Sample:
    """A conversation with one image, of which the last tenth is the answer."""
    side = int((length * IMAGE_TOKEN_SHARE) ** 0.5)
    image, answer = side * side, max(1, length // 10)
    ids, types = torch.randint(300, 900, (length,)), torch.zeros(length, dtype=torch.int64)
    types[2 : 2 + image] = 1
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-answer:] = ids[-answer:]
    spans = {"answers": (Span(length - answer, length, "student"),), "images": (Span(2, 2 + image, "student"),)}
    return Sample(
        name=name, input_ids=ids, labels=labels, mm_token_type_ids=types,
        pixel_values=torch.randn(4 * image, 1176), image_grid_thw=torch.tensor([[1, 2 * side, 2 * side]]),
        objects=(), captions=(), image_size=(28 * side, 28 * side), **spans,
    )  # fmt: skip


def training_step(model: Qwen2_5_VLForConditionalGeneration | BBUModel, batch: Any) -> _Step:
    """Forward and backward pass of the language loss; returns the loss."""
    image_token = model.config.image_token_id
    ids = torch.where(batch["mm_token_type_ids"] == 1, image_token, batch["input_ids"])
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch} | {"input_ids": ids}
    supervision = find_supervision(batch["labels"], batch["answer_roles"] == 1)

    def step() -> float:
        model.zero_grad()
        states = model.model(**inputs, use_cache=False)[0]
        loss = language_sums(states, model.lm_head, supervision).student_loss
        loss.backward()
        return loss.item()

    return step


def best_seconds(steps: dict[str, _Step]) -> dict[str, float]:
    """CPU seconds of the fastest of a few rounds, in which all take turns; all must have the same loss."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        losses = []
        for name, step in steps.items():
            start = time.process_time()
            losses.append(step())
            times[name].append(time.process_time() - start)
        assert max(losses) - min(losses) <= 1e-4 * max(losses), f"the losses differ: {losses}"
    return {name: min(values) for name, values in times.items()}
