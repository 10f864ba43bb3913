"""Photos in, described boxes out: the one place that joins model, prompt and parser for inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bbu.config.domains import DataConfig, ModelConfig
from bbu.config.load import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.prompts import get_prompt
from bbu.data.types import Sample
from bbu.errors import CheckpointError
from bbu.inference.parse import ParsedAnswer, parse_answer
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.resize import smart_resize
from bbu.rundir import RUN_CONFIG
from bbu.schema import Box

MODEL_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


class AnswerPredictor:
    """Greedy answers of one model folder, parsed. Boxes are in pixels of the image as the model sees it."""

    def __init__(self, folder: str | Path, model: ModelConfig, data: DataConfig, device: str = "cpu") -> None:
        self._config = model
        # Any: transformers' decorators hide the types of generate and to
        self._model: Any = load_model(folder, model, for_training=False)
        self._model.eval().to(device)
        self._tokenizer = load_tokenizer(folder)
        prompt = get_prompt(data.language, data.eval_prompt)
        self._builder = SampleBuilder(data, self._tokenizer, load_image_processor(folder), prompt)
        self._limits = (data.min_pixels, data.max_pixels)
        self._collate = StandardDataCollator(pad_token_id(self._tokenizer, folder), side="left")

    def predict(self, images: Sequence[Image.Image], prompt: str | None = None) -> list[ParsedAnswer]:
        """One answer per image; `prompt` replaces the instruction of the config."""
        samples = [self._builder.ask(f"image {i}", [image], prompt) for i, image in enumerate(images)]
        size = self._config.generation_batch_size
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        return [answer for batch in batches for answer in self._answer(batch)]

    def predict_detection(
        self, images: Sequence[Image.Image], prompt: str | None = None
    ) -> tuple[list[list[Box]], list[list[str]]]:
        """(boxes, captions), one list per image; boxes are (x1, y1, x2, y2) in pixels of the image given."""
        answers = self.predict(images, prompt)
        boxes = [self._original(a, image) for a, image in zip(answers, images, strict=True)]
        return boxes, [[item.desc for item in answer.objects] for answer in answers]

    def _original(self, answer: ParsedAnswer, image: Image.Image) -> list[Box]:
        plan = smart_resize(*image.size, *self._limits)
        back = image.width / plan.width, image.height / plan.height
        return [(x1 * back[0], y1 * back[1], x2 * back[0], y2 * back[1]) for x1, y1, x2, y2 in _boxes(answer)]

    @torch.inference_mode()
    def _answer(self, samples: Sequence[Sample]) -> list[ParsedAnswer]:
        batch = self._collate(samples)
        inputs = {key: batch[key].to(self._model.device) for key in MODEL_KEYS}
        output = self._model.generate(
            **inputs,
            do_sample=False,
            use_cache=True,
            max_new_tokens=self._config.generation_max_new_tokens,
            repetition_penalty=self._config.generation_repetition_penalty,
        )
        assert isinstance(output, torch.Tensor)
        answers = output[:, batch["input_ids"].shape[1] :]
        return [self._parse(ids, sample) for ids, sample in zip(answers, samples, strict=True)]

    def _parse(self, ids: torch.Tensor, sample: Sample) -> ParsedAnswer:
        ends = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(ends, int)
        finished = bool(torch.eq(ids, ends).any())
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        width, height = sample.image_size
        return parse_answer(text, finished=finished, width=width, height=height)


class Qwen25VLInference(AnswerPredictor):
    """A checkpoint of this project as a predictor, under the config it was trained with.

    checkpoint_dir: a published `checkpoint-{step}` folder. overrides: `key=value` texts on top of its config.
    Raises CheckpointError for another folder, ModelError or ConfigError for what is wrong inside.
    """

    def __init__(self, checkpoint_dir: str | Path, *, overrides: Sequence[str] = (), device: str | None = None) -> None:
        path = Path(checkpoint_dir) / RUN_CONFIG
        if not path.is_file():
            raise CheckpointError(f"{checkpoint_dir}: no {RUN_CONFIG}; name a checkpoint-{{step}} folder of a run")
        self.config = load_config(str(path), overrides=overrides)
        super().__init__(checkpoint_dir, self.config.model, self.config.data, device or best_device())


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _boxes(answer: ParsedAnswer) -> list[Box]:
    return [item.bbox_2d for item in answer.objects]
