"""Photos in, described boxes out: the one place that joins model, prompt and parser for inference.

There are two ways to find parts: the answer the language model writes, and the detection head. They can be asked
apart or together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from bbu.config.domains import DataConfig, DetectionConfig, ModelConfig
from bbu.config.read import load_config
from bbu.data.collators import Batch, StandardDataCollator
from bbu.data.dataset import SampleBuilder, read_pool
from bbu.data.prompts import get_prompt
from bbu.data.types import Sample
from bbu.errors import CheckpointError, ModelError
from bbu.inference.merge import merge
from bbu.inference.parse import parse_answer
from bbu.inference.scores import SCORE_SOURCE, ChosenLogProbabilities, object_scores
from bbu.losses.boxes import to_corners
from bbu.models.qwen import DetectionQuery, load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.resize import smart_resize
from bbu.run.folder import RUN_CONFIG
from bbu.schema import SOURCES, BBUObject, Box, Source, View

MODEL_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


@dataclass(frozen=True)
class Detections:
    """What was found in one photo: boxes in pixels of the image as the model sees it (`size`, width and height),
    a score beside each object, and how the answer read (`ok` for the head, which cannot be malformed)."""

    objects: tuple[BBUObject, ...]
    scores: tuple[float, ...]
    score_source: str
    size: tuple[int, int]
    status: str = "ok"
    rejected: dict[str, int] = field(default_factory=dict)

    def scoring_at_least(self, min_score: float) -> Detections:
        """Without objects whose score is below `min_score`."""
        kept = [(item, score) for item, score in zip(self.objects, self.scores, strict=True) if score >= min_score]
        objects, scores = tuple(item for item, _ in kept), tuple(score for _, score in kept)
        return dataclasses.replace(self, objects=objects, scores=scores)


class Predictor:
    """A model folder that finds parts.

    bf16: compute on a GPU in bfloat16, as training did. num_teachers: worked examples of the pool before each photo.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ModelConfig,
        data: DataConfig,
        detection: DetectionConfig,
        *,
        device: str = "cpu",
        bf16: bool = False,
        num_teachers: int = 0,
    ) -> None:
        if bf16 and device != "cpu":
            model = dataclasses.replace(model, torch_dtype="bfloat16")
        self._config, self._detection = model, detection
        # Any: transformers' decorators hide the types of generate and to
        self._model: Any = load_model(folder, model, for_training=False)
        self._model.eval().to(device)
        self._tokenizer = load_tokenizer(folder)
        prompt = get_prompt(data.language, data.eval_prompt)
        self._builder = SampleBuilder(data, self._tokenizer, load_image_processor(folder), prompt)
        self._limits = (data.min_pixels, data.max_pixels)
        self._collate = StandardDataCollator(pad_token_id(self._tokenizer, folder), side="left")
        self._teachers: list[View] = read_pool(data)[:num_teachers] if num_teachers else []

    @property
    def sources(self) -> tuple[Source, ...]:
        """What this model can be asked: a model without a head has its answer alone."""
        return SOURCES if self._model.detection_head is not None else SOURCES[:1]

    def predict(
        self,
        images: Sequence[Image.Image],
        prompt: str | None = None,
        *,
        source: Source = "answer",
        min_score: float | None = None,
    ) -> list[Detections]:
        """Detect the objects in each photo, `generation_batch_size` photos at a time.

        Args:
            images: RGB photos.
            prompt: the instruction; None takes the config's.
            source: which part of the model to query.
            min_score: objects of the head with a lower score are left out; None takes detection_score_threshold.

        Raises:
            ModelError: the detection head is queried, but the model has none.
        """
        if source not in self.sources:
            raise ModelError(f"{self._model.name_or_path}: no detection head; ask for source answer")
        min_score = self._detection.detection_score_threshold if min_score is None else min_score
        find = {
            "answer": self._answer,
            "head": partial(self._head, min_score=min_score),
            "both": partial(self._both, min_score=min_score),
        }[source]
        found: list[Detections] = []
        for start in range(0, len(images), self._config.generation_batch_size):
            part = images[start : start + self._config.generation_batch_size]
            samples = [
                self._builder.ask(f"image {start + i}", [im], prompt, self._teachers) for i, im in enumerate(part)
            ]
            found += find(samples, self._moved(self._collate(samples)))
        return found

    def predict_detection(
        self, images: Sequence[Image.Image], prompt: str | None = None, *, source: Source = "answer"
    ) -> tuple[list[list[Box]], list[list[str]]]:
        """(boxes, captions), one list per image; boxes are (x1, y1, x2, y2) in pixels of the image given."""
        found = self.predict(images, prompt, source=source)
        boxes = [self.in_pixels_of(image, one) for image, one in zip(images, found, strict=True)]
        return boxes, [[item.desc for item in one.objects] for one in found]

    def in_pixels_of(self, image: Image.Image, found: Detections) -> list[Box]:
        """The boxes, carried from the model's pixels to the given image's."""
        plan = smart_resize(*image.size, *self._limits)
        x, y = image.width / plan.width, image.height / plan.height
        return [(b[0] * x, b[1] * y, b[2] * x, b[3] * y) for b in (item.bbox_2d for item in found.objects)]

    def _moved(self, batch: Batch) -> dict[str, Any]:
        moved: dict[str, Any] = {
            k: v.to(self._model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
        }
        moved["pixel_values"] = moved["pixel_values"].to(self._model.dtype)
        return moved

    @torch.inference_mode()
    def _answer(self, samples: Sequence[Sample], batch: dict[str, Any]) -> list[Detections]:
        recorder = ChosenLogProbabilities()
        output = self._model.generate(
            **{key: batch[key] for key in MODEL_KEYS},
            do_sample=False,
            use_cache=True,
            max_new_tokens=self._config.generation_max_new_tokens,
            repetition_penalty=self._config.generation_repetition_penalty,
            logits_processor=LogitsProcessorList([recorder]),
        )
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        return [self._read(*each) for each in zip(answers, recorder.rows(), samples, strict=True)]

    def _read(self, ids: list[int], log_probabilities: list[float], sample: Sample) -> Detections:
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(end, int)
        finished = end in ids
        ids = ids[: ids.index(end)] if finished else ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        answer = parse_answer(text, finished=finished, width=sample.image_size[0], height=sample.image_size[1])
        scores = object_scores(answer, text, ids, log_probabilities, self._tokenizer)
        return Detections(answer.objects, scores, SCORE_SOURCE, sample.image_size, answer.status, answer.rejected)

    @torch.inference_mode()
    def _head(self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float) -> list[Detections]:
        """The vision tower and the head alone; the language model is not run."""
        query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
        given = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
        _, output = self._model(**given, detection=query, read_detection=lambda output, model: output)
        scores = output.logits[-1].sigmoid().masked_fill(~output.valid, 0.0)
        kept, order = scores.topk(min(scores.shape[1], self._detection.detection_max_predictions), dim=1)
        wanted = (kept >= min_score) & (kept > 0)
        rows, columns = wanted.nonzero(as_tuple=True)
        queries = order[rows, columns]
        captions = self._captions(output.states[rows, queries])
        corners = to_corners(output.boxes[-1][rows, queries]).clamp(0, 1).tolist()
        found: list[tuple[list[BBUObject], list[float]]] = [([], []) for _ in samples]
        for row, box, caption, score in zip(
            rows.tolist(), corners, captions, kept[rows, columns].tolist(), strict=True
        ):
            width, height = samples[row].image_size
            pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
            if pixels[0] < pixels[2] and pixels[1] < pixels[3] and caption:
                found[row][0].append(BBUObject(pixels, caption))
                found[row][1].append(score)
        return [
            Detections(tuple(objects), tuple(scores), "objectness", sample.image_size)
            for (objects, scores), sample in zip(found, samples, strict=True)
        ]

    def _captions(self, states: torch.Tensor) -> list[str]:
        if not len(states):
            return []
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(end, int)
        ids, _ = self._model.detection_head.captions.generate(
            states, self._model.get_input_embeddings(), self._model.lm_head, end
        )
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _both(self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float) -> list[Detections]:
        pairs = zip(self._answer(samples, batch), self._head(samples, batch, min_score), strict=True)
        return [merge_detections(answer, head) for answer, head in pairs]


def merge_detections(answer: Detections, head: Detections) -> Detections:
    """The answer's objects, confirmed by the head where it saw them too, and what the head alone saw."""
    objects, scores = merge((answer.objects, answer.scores), (head.objects, head.scores))
    return Detections(objects, scores, "both", answer.size, answer.status, answer.rejected)


class Qwen25VLInference(Predictor):
    """A checkpoint of this project as a predictor, under the config it was trained with.

    checkpoint_dir: a published `checkpoint-{step}` folder. overrides: `key=value` texts on top of its config.
    num_teacher_samples: worked examples before each photo. Raises CheckpointError for another folder, ModelError or
    ConfigError for what is wrong inside.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        overrides: Sequence[str] = (),
        device: str | None = None,
        num_teacher_samples: int = 0,
    ) -> None:
        path = Path(checkpoint_dir) / RUN_CONFIG
        if not path.is_file():
            raise CheckpointError(f"{checkpoint_dir}: no {RUN_CONFIG}; name a checkpoint-{{step}} folder of a run")
        config = self.config = load_config(str(path), overrides=overrides)
        super().__init__(
            checkpoint_dir,
            config.model,
            config.data,
            config.detection,
            device=device or best_device(),
            bf16=config.training.bf16,
            num_teachers=num_teacher_samples,
        )


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
