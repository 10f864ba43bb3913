"""Photos in, described boxes out: the one place that joins model, prompt and parser for inference.

There are two sources of objects: the answer that the language model writes, and the detection head. They can be
queried one by one or together (`both`).
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

from bbu.boxes import scale_box, to_corners
from bbu.config.domains import DataConfig, DetectionConfig, ModelConfig
from bbu.config.read import load_recorded_config
from bbu.data.collators import Batch, StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.prompts import get_prompt
from bbu.data.records import read_pool
from bbu.data.types import Sample
from bbu.errors import CheckpointError, ModelError
from bbu.inference.merge import merge_objects
from bbu.inference.parse import parse_answer
from bbu.inference.scores import SCORE_SOURCE, ChosenLogProbabilities, object_scores
from bbu.models.detection_head import DetectionOutput
from bbu.models.qwen import DetectionQuery, load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.models.torch_settings import prepare_torch
from bbu.resize import smart_resize
from bbu.run.folder import RUN_CONFIG
from bbu.schema import SOURCES, BBUObject, Box, Source, View

MODEL_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
"""The keys of a padded batch that the model takes."""


@dataclass(frozen=True)
class Detections:
    """The objects that one source detected in one photo."""

    objects: tuple[BBUObject, ...]
    """Their boxes are in pixels of the image as the model sees it."""
    scores: tuple[float, ...]
    """A score in 0..1 for each object."""
    score_source: str
    """What the scores are: coordinate_probability, objectness or both."""
    size: tuple[int, int]
    """Width and height of the image as the model sees it, in pixels."""
    status: str = "ok"
    """How the answer was parsed (`ParseStatus`); always ok for the head, whose output cannot be malformed."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> number of things in the answer that are not usable objects."""

    def scoring_at_least(self, min_score: float) -> Detections:
        """Leave out the objects whose score is below `min_score`."""
        pairs = [(item, score) for item, score in zip(self.objects, self.scores, strict=True) if score >= min_score]
        objects, scores = tuple(item for item, _ in pairs), tuple(score for _, score in pairs)
        return dataclasses.replace(self, objects=objects, scores=scores)


class Predictor:
    """Detects objects in photos with the model of a folder.

    Args:
        folder: a model folder, or a checkpoint.
        model: how the model is loaded and how it generates.
        data: prompt, pixel limits and the pool of worked examples.
        detection: threshold and limit of the head's objects.
        device: a torch device.
        bf16: compute on a GPU in bfloat16, as training did.
        num_teachers: worked examples of the pool before each photo.
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
        # Any, because transformers' decorators hide the types of generate() and to().
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
        """The sources that this model has: without a detection head, the answer alone."""
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
            raise ModelError(f"{self._model.name_or_path}: no detection head; use source answer")
        min_score = self._detection.detection_score_threshold if min_score is None else min_score
        query = {
            "answer": self._query_answer,
            "head": partial(self._query_head, min_score=min_score),
            "both": partial(self._query_both, min_score=min_score),
        }[source]
        detections: list[Detections] = []
        for start in range(0, len(images), self._config.generation_batch_size):
            group = images[start : start + self._config.generation_batch_size]
            samples = [
                self._builder.build_question(f"image {start + i}", [im], prompt, self._teachers)
                for i, im in enumerate(group)
            ]
            detections += query(samples, self._to_device(self._collate(samples)))
        return detections

    def predict_detection(
        self, images: Sequence[Image.Image], prompt: str | None = None, *, source: Source = "answer"
    ) -> tuple[list[list[Box]], list[list[str]]]:
        """Detect objects and return boxes and captions, a list of each for every image.

        Args:
            images: RGB photos.
            prompt: the instruction; None takes the config's.
            source: which part of the model to query.

        Returns:
            The boxes, (x1, y1, x2, y2) in pixels of the image given, and the captions in the same order.

        Raises:
            ModelError: the detection head is queried, but the model has none.
        """
        detections = self.predict(images, prompt, source=source)
        boxes = [self.boxes_in_image(image, one) for image, one in zip(images, detections, strict=True)]
        return boxes, [[item.desc for item in one.objects] for one in detections]

    def boxes_in_image(self, image: Image.Image, detections: Detections) -> list[Box]:
        """Return the boxes in pixels of the given image instead of the image as the model sees it."""
        plan = smart_resize(*image.size, *self._limits)
        return [plan.to_source(item.bbox_2d) for item in detections.objects]

    def _to_device(self, batch: Batch) -> dict[str, Any]:
        moved: dict[str, Any] = {
            k: v.to(self._model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
        }
        moved["pixel_values"] = moved["pixel_values"].to(self._model.dtype)
        return moved

    @torch.inference_mode()
    def _query_answer(self, samples: Sequence[Sample], batch: dict[str, Any]) -> list[Detections]:
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
        return [self._read_answer(*row) for row in zip(answers, recorder.rows(), samples, strict=True)]

    def _read_answer(self, ids: list[int], log_probabilities: list[float], sample: Sample) -> Detections:
        """Parse one generated answer; `ids` may be padded after the end token."""
        end = self._end_token
        finished = end in ids
        ids = ids[: ids.index(end)] if finished else ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        answer = parse_answer(text, finished=finished, width=sample.image_size[0], height=sample.image_size[1])
        scores = object_scores(answer, text, ids, log_probabilities, self._tokenizer)
        return Detections(answer.objects, scores, SCORE_SOURCE, sample.image_size, answer.status, answer.rejected)

    @torch.inference_mode()
    def _query_head(self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float) -> list[Detections]:
        """Run the vision tower and the head; the language model is not run."""
        query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
        vision = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
        _, output = self._model(**vision, detection=query, read_detection=lambda output, model: output)
        rows, queries, scores = self._best_queries(output, min_score)
        captions = self._decode_captions(output.states[rows, queries])
        # 0..1 of the image, from the last decoder layer
        corners = to_corners(output.boxes[-1][rows, queries]).clamp(0, 1).tolist()
        pairs: list[list[tuple[BBUObject, float]]] = [[] for _ in samples]
        for row, box, caption, score in zip(rows.tolist(), corners, captions, scores.tolist(), strict=True):
            pixels = scale_box(box, (1, 1), samples[row].image_size)
            if pixels[0] < pixels[2] and pixels[1] < pixels[3] and caption:
                pairs[row].append((BBUObject(pixels, caption), score))
        return [
            Detections(tuple(item for item, _ in one), tuple(s for _, s in one), "objectness", sample.image_size)
            for one, sample in zip(pairs, samples, strict=True)
        ]

    def _best_queries(
        self, output: DetectionOutput, min_score: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Select the queries that are reported: (row in the batch, query, score), three [M], best first in each row."""
        scores = output.logits[-1].sigmoid().masked_fill(~output.valid, 0.0)
        best, order = scores.topk(min(scores.shape[1], self._detection.detection_max_predictions), dim=1)
        # A score of 0 is that of a query which is padding.
        rows, columns = ((best >= min_score) & (best > 0)).nonzero(as_tuple=True)
        return rows, order[rows, columns], best[rows, columns]

    def _decode_captions(self, states: torch.Tensor) -> list[str]:
        """Generate a caption for each query state, [M, D] with D the width of the head."""
        if not len(states):
            return []
        ids, _ = self._model.detection_head.captions.generate(
            states, self._model.get_input_embeddings(), self._model.lm_head, self._end_token
        )
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _query_both(self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float) -> list[Detections]:
        pairs = zip(self._query_answer(samples, batch), self._query_head(samples, batch, min_score), strict=True)
        return [merge_detections(answer, head) for answer, head in pairs]

    @property
    def _end_token(self) -> int:
        """The token that ends an answer and a caption."""
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(end, int)
        return end


def merge_detections(answer: Detections, head: Detections) -> Detections:
    """Merge two sources: the answer's objects, confirmed where the head detected them too, and the head's others."""
    objects, scores = merge_objects((answer.objects, answer.scores), (head.objects, head.scores))
    return Detections(objects, scores, "both", answer.size, answer.status, answer.rejected)


class Qwen25VLInference(Predictor):
    """Predicts with a checkpoint of this project, under the config that it was trained with.

    Args:
        checkpoint_dir: a published `checkpoint-{step}` folder.
        overrides: `key=value` texts on top of its config.
        device: a torch device; None takes the GPU if there is one.
        num_teacher_samples: worked examples before each photo.

    Raises:
        CheckpointError: the folder is not a checkpoint.
        ModelError, ConfigError: its model or its config cannot be loaded.
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
        config = self.config = load_recorded_config(path, overrides)
        prepare_torch(config.model, config.infrastructure)
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
    """Name the GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
