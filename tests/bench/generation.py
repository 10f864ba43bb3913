"""32 photos in batches of 16 beside transformers' generate one by one, and the captions of the detection head."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.read import load_config
from bbu.inference.parse import parse_answer
from bbu.inference.predictor import Detections, Qwen25VLInference
from bbu.models.caption_decoder import CaptionDecoder
from bbu.models.qwen import MODEL_INPUTS
from bbu.run.folder import RunFolder
from bbu.schema import BBUObject
from bbu.training.coordinator import TrainingCoordinator
from bbu.training.preemption import StopFlag
from tests.bench._results import Row
from tests.commands import make_demo

T = TypeVar("T")
PHOTOS, BATCH, STEPS, REPEATS = 32, 16, 150, 3
SETTINGS = (
    f"max_steps={STEPS}", f"save_steps={STEPS}", "eval_strategy=no", "detection_enabled=true", "llm_lr=1e-3",
    "per_device_train_batch_size=4", "detection_lr=1e-3", "adapter_lr=1e-3", "generation_max_new_tokens=96",
    f"generation_batch_size={BATCH}", "detection_num_queries=100", "detection_max_predictions=100",
    "detection_hidden_dim=64", "detection_num_layers=2", "detection_num_heads=4", "detection_ffn_dim=128",
    "detection_adapter_dim=64", "teacher_ratio=0.0",
)  # fmt: skip
"""Trained just long enough that answers and captions end by themselves."""


def run() -> list[Row]:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        predictor, images = prepare(Path(folder))
        return [measure_answers(predictor, images), measure_captions(predictor, images)]


def prepare(root: Path) -> tuple[Qwen25VLInference, list[Image.Image]]:
    demo = make_demo(root / "demo", photos=PHOTOS + 8, seed=3)
    config = load_config("smoke", overrides=[*demo.settings, f"output_root={root}", *SETTINGS])
    TrainingCoordinator(config, StopFlag(), {}).run()
    checkpoint = RunFolder.of(root, config.infrastructure.run_name).checkpoint(STEPS)
    paths = sorted((demo.root / "data" / config.data.image_folder).rglob("*.jp*g"))[:PHOTOS]
    return Qwen25VLInference(checkpoint), [Image.open(path).convert("RGB") for path in paths]


def measure_answers(predictor: Qwen25VLInference, images: Sequence[Image.Image]) -> Row:
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(predictor._model.name_or_path).eval()
    ours, our_s = best(lambda: [d.objects for d in predictor.predict(images, source="answer")])
    theirs, their_s = best(lambda: [answer_alone(predictor, stock, image) for image in images])
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert equal >= 0.9 * len(images), "batches answer differently"
    return Row(
        f"answers of {len(images)} photos, batches of {BATCH}, tiny model",
        f"{our_s:.2f} s", f"transformers' generate one by one {their_s:.2f} s", their_s / our_s, "5x",
        f"{equal} of {len(images)} answers equal; others differ by rounding in a padded batch",
    )  # fmt: skip


def answer_alone(
    predictor: Qwen25VLInference, stock: Qwen2_5_VLForConditionalGeneration, image: Image.Image
) -> tuple[BBUObject, ...]:
    """The objects that the stock model writes for one photo."""
    sample = predictor._question("photo", image, None)
    batch = predictor._collate([sample])
    with torch.inference_mode():
        ids = stock.generate(
            **{key: batch[key] for key in MODEL_INPUTS if key in batch}, do_sample=False,
            max_new_tokens=predictor.config.model.generation_max_new_tokens,
        )[0, batch["input_ids"].shape[1] :]  # fmt: skip
    text = predictor._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    width, height = sample.image_size
    return parse_answer(text, finished=bool(ids[-1] in predictor._end_tokens), width=width, height=height).objects


def measure_captions(predictor: Qwen25VLInference, images: Sequence[Image.Image]) -> Row:
    def detect(min_score: float | None = 0.0) -> list[Detections]:
        return predictor.predict(images, source="head", min_score=min_score)

    ours, our_s = best(detect)
    with patch.object(CaptionDecoder, "generate", write_until_all_end):
        theirs, their_s = best(detect)
    assert ours == theirs, "captions differ"
    with patch.object(CaptionDecoder, "generate", lambda self, states, *_: states.new_zeros(len(states), 1).long()):
        _, without_s = best(detect)
    _, kept_s = best(lambda: detect(None))
    return Row(
        f"head on {len(images)} photos, captions of all 100 queries, as average precision needs them",
        f"{our_s:.2f} s", f"all captions as long as the longest {their_s:.2f} s", their_s / our_s, "",
        f"{without_s:.2f} s of ours without captions; {kept_s:.2f} s at detection_score_threshold, as bbu.infer",
    )  # fmt: skip


def write_until_all_end(
    decoder: CaptionDecoder, states: torch.Tensor, embed: torch.nn.Module, language_head: torch.nn.Module, end: int
) -> torch.Tensor:
    """Greedy captions in one batch that keeps those that have ended."""
    inputs, cache, written = states[:, None], None, []
    ended = torch.zeros(len(states), dtype=torch.bool)
    for _ in range(decoder.max_length):
        hidden, cache = decoder._run(inputs, cache)
        scores = language_head(decoder.output(hidden[:, -1])).float().log_softmax(-1)
        token = torch.where(ended, end, scores.max(-1).indices)
        written.append(token)
        ended = ended | (token == end)
        if bool(ended.all()):
            break
        inputs = decoder.token_adapter(embed(token[:, None]).to(states.dtype))
    return torch.stack(written, dim=1)


def best(call: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and the seconds of the fastest of some."""
    results, seconds = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        results.append(call())
        seconds.append(time.perf_counter() - began)
    return results[0], min(seconds)
