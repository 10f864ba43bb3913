"""Photos in, described boxes out: the one place that joins model, prompt and parser for inference.

There are two sources of objects: the answer that the language model writes, and the detection head. They can be
queried one by one or together (`both`). Photos are decoded when their batch is due and dropped once they are cut into
patches, so the memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import LogitsProcessorList

from bbu.boxes import to_corners
from bbu.config.domains import DataConfig, DetectionConfig, ModelConfig
from bbu.config.read import load_recorded_config
from bbu.data.collators import Batch, StandardDataCollator
from bbu.data.dataset import SampleBuilder
from bbu.data.images import upright_rgb
from bbu.data.prompts import get_prompt
from bbu.data.records import read_pool
from bbu.data.types import Sample
from bbu.errors import CheckpointError, DataError, ModelError
from bbu.inference.merge import confirm_finds, overlaps_any, select_distinct
from bbu.inference.parse import parse_answer
from bbu.inference.photos import Photo, PhotoInput, iterate_photos
from bbu.inference.results import FAILED, DetectionLists, PhotoResult, Tally
from bbu.inference.scores import SCORE_SOURCE, ChosenLogProbabilities, object_scores
from bbu.logs import print_notice
from bbu.models.adapters import round_adapters
from bbu.models.attention import VARLEN, check_attention_is_available
from bbu.models.detection_head import DetectionOutput
from bbu.models.qwen import MODEL_INPUTS, DetectionQuery, load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.models.torch_settings import prepare_torch
from bbu.resize import ResizePlan, smart_resize
from bbu.run.checkpoints import MANIFEST, verify_model
from bbu.run.folder import RUN_CONFIG, checkpoint_name, checkpoint_steps
from bbu.schema import SOURCES, BBUObject, Source, View

_T = TypeVar("_T")


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


_Query = Callable[[Sequence[Sample]], list[Detections]]


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
        if model.vision_attn_implementation == VARLEN:
            check_attention_is_available({"vision_attn_implementation": VARLEN})
        # Any, because transformers' decorators hide the types of generate() and to().
        self._model: Any = load_model(folder, model, for_training=False)
        round_adapters(self._model)
        self._model.eval().to(device)
        self._tokenizer = load_tokenizer(folder)
        prompt = get_prompt(data.language, data.eval_prompt)
        self._builder = SampleBuilder(data, self._tokenizer, load_image_processor(folder), prompt)
        self._limits = (data.min_pixels, data.max_pixels)
        self._collate = StandardDataCollator(pad_token_id(self._tokenizer, folder), side="left")
        self._teachers = _read_teachers(data, num_teachers)
        self._has_stated_source = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that this model has: without a detection head, the answer alone."""
        return SOURCES if self._model.detection_head is not None else SOURCES[:1]

    @property
    def default_source(self) -> Source:
        """What is queried where no source is named: the head where there is one, else the answer."""
        return "head" if "head" in self.sources else "answer"

    def predict(
        self,
        images: Sequence[Image.Image],
        prompt: str | None = None,
        *,
        source: Source = "answer",
        min_score: float | None = None,
    ) -> list[Detections]:
        """Detect the objects in images in memory, `generation_batch_size` of them at a time.

        Args:
            images: they are turned upright as their EXIF says.
            prompt: the instruction; None takes the config's.
            source: which part of the model to query.
            min_score: objects of the head with a lower score are left out; None takes detection_score_threshold.

        Raises:
            ModelError: the detection head is queried, but the model has none.
            DataError: an image cannot be used, or the prompt is empty.
        """
        query = self._query(source, prompt, min_score)
        named = ((f"image {number}", image) for number, image in enumerate(images))
        samples = (self._question(name, upright_rgb(image), prompt) for name, image in named)
        return [item for batch in self._batches(samples) for item in query(batch)]

    def stream_results(
        self,
        images: PhotoInput | Iterable[PhotoInput],
        prompt: str | None = None,
        *,
        source: Source | None = None,
        min_score: float | None = None,
    ) -> Iterator[PhotoResult]:
        """Detect objects photo by photo, and yield each batch's results as soon as they are there.

        A photo that cannot be read gives a result with the status `failed`, and the others go on.

        Args:
            images: one photo or any number of them, such as a folder or a generator (`photos.PhotoInput`).
            prompt: the instruction; None takes the config's.
            source: which part of the model to query; None takes the head where there is one, else the answer.
            min_score: objects of the head with a lower score are left out; None takes detection_score_threshold.

        Yields:
            One result for each photo, in their order.

        Raises:
            ModelError: the detection head is queried, but the model has none.
            DataError: something is no photo by its type, a folder or pattern has none, or the prompt is empty.
        """
        source = source or self.default_source
        query = self._query(source, prompt, min_score)
        return self._stream(iterate_photos(images), query, source, prompt)

    def predict_detection(
        self,
        images: PhotoInput | Iterable[PhotoInput],
        prompt: str | None = None,
        *,
        source: Source | None = None,
    ) -> DetectionLists:
        """Detect objects and return the pair (boxes, captions), a list of each for every photo, also for a single one.

        `boxes[i]` and `captions[i]` belong to photo i, in the order given; a folder or pattern stands for its photos,
        sorted. The pair also has `results`, which know scores, source and status, and draw themselves. How it went is
        said in one line on stderr where not all went well, and at the first call which source is queried.

        Args:
            images: as for `stream_results`.
            prompt: the instruction; None takes the config's.
            source: which part of the model to query; None takes the head where there is one, else the answer.

        Returns:
            The boxes, (x1, y1, x2, y2) in pixels of the upright photo, and the captions in the same order. Both lists
            of a photo that cannot be read are empty, and its result has the status `failed` and an error.

        Raises:
            ModelError: the detection head is queried, but the model has none.
            DataError: something is no photo, or no photo can be read.
        """
        if source is None:
            self._state_default_source()
        # The caller of a generator does not keep its images, so the results must not either.
        is_kept = isinstance(images, Sequence | Image.Image | np.ndarray)
        results = [
            item if is_kept or item.photo is None or item.photo.is_file else dataclasses.replace(item, photo=None)
            for item in self.stream_results(images, prompt, source=source)
        ]
        _report(results)
        return DetectionLists(results)

    def _stream(
        self, photos: Iterator[Photo], query: _Query, source: Source, prompt: str | None
    ) -> Iterator[PhotoResult]:
        for group in self._batches(photos):
            prepared = [self._prepare(photo, prompt) for photo in group]
            samples = [item.sample for item in prepared if isinstance(item, _Prepared)]
            detections = iter(query(samples) if samples else ())
            for photo, item in zip(group, prepared, strict=True):
                if isinstance(item, _Prepared):
                    yield _result_of(photo, item.plan, source, next(detections))
                else:
                    yield PhotoResult(photo.name, source, FAILED, error=str(item), photo=photo)

    def _prepare(self, photo: Photo, prompt: str | None) -> _Prepared | DataError:
        """Decode a photo and cut it into patches, or say why that is not possible."""
        try:
            image = photo.load()
            return _Prepared(self._question(photo.name, image, prompt), smart_resize(*image.size, *self._limits))
        except DataError as error:
            return error

    def _question(self, name: str, image: Image.Image, prompt: str | None) -> Sample:
        return self._builder.build_question(name, [image], prompt, self._teachers)

    def _batches(self, items: Iterable[_T]) -> Iterator[list[_T]]:
        """Take `generation_batch_size` items at a time, and none before they are needed."""
        iterator = iter(items)
        while batch := list(islice(iterator, self._config.generation_batch_size)):
            yield batch

    def _query(self, source: Source, prompt: str | None, min_score: float | None) -> _Query:
        """The function that queries a source on a batch of samples. Raises ModelError, and DataError for the prompt."""
        if source not in self.sources:
            advice = "use source answer" if source in SOURCES else f"use one of {', '.join(self.sources)}"
            problem = "no detection head" if source in SOURCES else f"no source {source!r}"
            raise ModelError(f"{self._model.name_or_path}: {problem}; {advice}")
        if prompt is not None and not prompt.strip():
            raise DataError("the prompt is empty; leave it out to take the config's")
        threshold = self._detection.detection_score_threshold if min_score is None else min_score
        query = {
            "answer": self._query_answer,
            "head": partial(self._query_head, min_score=threshold),
            "both": partial(self._query_both, min_score=threshold),
        }[source]
        return lambda samples: query(samples, self._to_device(self._collate(samples)))

    def _state_default_source(self) -> None:
        """Say once which source is queried, since the checkpoint decides it."""
        if not self._has_stated_source:
            self._has_stated_source = True
            print_notice("bbu.inference", describe_source(self))

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
            **{key: batch[key] for key in MODEL_INPUTS if key in batch},
            do_sample=False,
            use_cache=True,
            max_new_tokens=self._config.generation_max_new_tokens,
            repetition_penalty=self._config.generation_repetition_penalty,
            eos_token_id=self._end_tokens,
            logits_processor=LogitsProcessorList([recorder]),
        )
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        return [self._read_answer(*row) for row in zip(answers, recorder.rows(), samples, strict=True)]

    def _read_answer(self, ids: list[int], log_probabilities: list[float], sample: Sample) -> Detections:
        """Parse one generated answer; `ids` may be padded after an end token."""
        end = next((place for place, token in enumerate(ids) if token in self._end_tokens), None)
        finished = end is not None
        ids = ids[:end]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        answer = parse_answer(text, finished=finished, width=sample.image_size[0], height=sample.image_size[1])
        scores = object_scores(answer, text, ids, log_probabilities, self._tokenizer)
        return Detections(answer.objects, scores, SCORE_SOURCE, sample.image_size, answer.status, answer.rejected)

    @torch.inference_mode()
    def _query_head(
        self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float, answers: Sequence[Detections] = ()
    ) -> list[Detections]:
        """Run the vision tower and the head; the language model is not run.

        Args:
            samples: the questions.
            batch: the same, collated.
            min_score: the least score of a find that is reported.
            answers: those to the questions; a find that marks a part named there is reported whatever its score.
        """
        query = DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"])
        vision = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
        _, output = self._model(**vision, detection=query, read_detection=lambda output, model: output)
        boxes, scores = _last_finds(output, [sample.image_size for sample in samples])
        named = [answer.objects for answer in answers] or [()] * len(samples)
        chosen = [
            (row, query)
            for row in range(len(samples))
            for query in self._best_queries(boxes[row], scores[row], min_score, named[row])
        ]
        captions = self._decode_captions(output.states[tuple(torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2).T)])
        pairs: list[list[tuple[BBUObject, float]]] = [[] for _ in samples]
        for (row, query), caption in zip(chosen, captions, strict=True):
            x1, y1, x2, y2 = boxes[row, query].tolist()
            if x1 < x2 and y1 < y2 and caption:
                pairs[row].append((BBUObject((x1, y1, x2, y2), caption), float(scores[row, query])))
        return [
            Detections(tuple(item for item, _ in one), tuple(s for _, s in one), "objectness", sample.image_size)
            for one, sample in zip(pairs, samples, strict=True)
        ]

    def _best_queries(
        self, boxes: NDArray[np.floating], scores: NDArray[np.floating], min_score: float, named: Sequence[BBUObject]
    ) -> list[int]:
        """Select the queries of one photo that are reported, best first; each part once.

        Args:
            boxes: of all queries [Q, 4], in pixels.
            scores: of all queries [Q]; 0 is that of a query which is padding.
            min_score: the least score that is reported.
            named: objects of the answer, whose parts are reported whatever the score.
        """
        is_reported = (scores > 0) & ((scores >= min_score) | overlaps_any(boxes, named))
        distinct = select_distinct(boxes, scores)[: self._detection.detection_max_predictions]
        return [query for query in distinct if is_reported[query]]

    def _decode_captions(self, states: torch.Tensor) -> list[str]:
        """Generate a caption for each query state, [M, D] with D the width of the head."""
        if not len(states):
            return []
        ids = self._model.detection_head.captions.generate(
            states, self._model.get_input_embeddings(), self._model.lm_head, self._end_token
        )
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _query_both(self, samples: Sequence[Sample], batch: dict[str, Any], min_score: float) -> list[Detections]:
        answers = self._query_answer(samples, batch)
        heads = self._query_head(samples, batch, min_score, answers)
        return [confirm_detections(head, answer, min_score) for head, answer in zip(heads, answers, strict=True)]

    @cached_property
    def _end_tokens(self) -> list[int]:
        """The tokens that end an answer: the model's own list (generation_config.json) and the chat's end token."""
        listed = self._model.generation_config.eos_token_id
        tokens = [] if listed is None else listed if isinstance(listed, list) else [listed]
        return sorted({*tokens, self._end_token})

    @property
    def _end_token(self) -> int:
        """The token that ends a turn of the chat and a caption."""
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert isinstance(end, int)
        return end


@dataclass(frozen=True)
class _Prepared:
    """A photo as the model takes it."""

    sample: Sample
    """The question about it."""
    plan: ResizePlan
    """How it was resized."""


def _last_finds(
    output: DetectionOutput, sizes: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Boxes [B, Q, 4] in pixels and scores [B, Q] of all queries, from the head's last layer; padding scores 0.

    Args:
        output: of the head, for B photos and Q queries.
        sizes: (width, height) of each photo.
    """
    corners = to_corners(output.boxes[-1]).clamp(0, 1).cpu().numpy()
    scores = output.logits[-1].sigmoid().masked_fill(~output.valid, 0.0).cpu().numpy()
    return corners * np.array([size * 2 for size in sizes])[:, None], scores


def _result_of(photo: Photo, plan: ResizePlan, source: Source, detections: Detections) -> PhotoResult:
    """Carry the detections in one photo back to its own pixels."""
    return PhotoResult(
        name=photo.name,
        source=source,
        status=detections.status,
        objects=tuple(BBUObject(plan.to_source(item.bbox_2d), item.desc) for item in detections.objects),
        scores=detections.scores,
        score_source=detections.score_source,
        width=plan.source_width,
        height=plan.source_height,
        rejected=detections.rejected,
        photo=photo,
    )


def _report(results: Sequence[PhotoResult]) -> None:
    """Say what did not go well; DataError where no photo could be read."""
    tally = Tally(results)
    if results and tally.failed == len(results):
        others = f" (and {len(results) - 1} other photos)" if len(results) > 1 else ""
        raise DataError(f"{results[0].error}{others}")
    for error in (item.error for item in results if item.error):
        print_notice("bbu.inference", error)
    if not tally.is_all_well:
        print_notice("bbu.inference", str(tally))


def _read_teachers(data: DataConfig, count: int) -> list[View]:
    """The first worked examples of the pool; DataError where it has fewer than requested."""
    if count == 0:
        return []
    file = read_pool(data)
    file.check_photos()
    pool = [record.student for _, record in file.used]
    if not 0 < count <= len(pool):
        raise DataError(f"{data.teacher_file}: {count} worked examples requested, the pool has {len(pool)}")
    return pool[:count]


def describe_source(predictor: Predictor) -> str:
    """Say which source is queried where none is named, and how to choose another."""
    if predictor.default_source == "head":
        return "objects come from the detection head (source answer or both: from the language model)"
    return "objects come from the language model's answer; this checkpoint has no detection head"


def confirm_detections(head: Detections, answer: Detections, min_score: float) -> Detections:
    """Take the head's finds that score at least `min_score`, and weaker ones that the answer names alike."""
    objects, scores = confirm_finds((head.objects, head.scores), (answer.objects, answer.scores), min_score)
    return Detections(objects, scores, "both", head.size, answer.status, answer.rejected)


class Qwen25VLInference(Predictor):
    """Predicts with a checkpoint of this project, under the config that it was trained with.

    Args:
        checkpoint_dir: a published `checkpoint-{step}` folder.
        overrides: `key=value` texts on top of its config.
        device: a torch device; None takes the GPU if there is one.
        num_teacher_samples: worked examples before each photo.

    Raises:
        CheckpointError: the folder is not a checkpoint, or it is damaged.
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
        folder = check_checkpoint(Path(checkpoint_dir).expanduser())
        config = self.config = load_recorded_config(folder / RUN_CONFIG, overrides)
        prepare_torch(config.model, config.infrastructure)
        super().__init__(
            folder,
            config.model,
            config.data,
            config.detection,
            device=device or best_device(),
            bf16=config.training.bf16,
            num_teachers=num_teacher_samples,
        )


def check_checkpoint(folder: Path) -> Path:
    """Return the folder once its files have passed its manifest; one without a manifest is a plain model folder."""
    if not (folder / RUN_CONFIG).is_file():
        steps = checkpoint_steps(folder)
        advice = f"name {checkpoint_name(steps[-1])} in it" if steps else "name a checkpoint-{step} folder of a run"
        raise CheckpointError(f"{folder}: no {RUN_CONFIG}; {advice}")
    if (folder / MANIFEST).exists():
        verify_model(folder)
    else:
        print_notice("bbu.inference", f"{folder}: no {MANIFEST}, so its files are not verified")
    return folder


def best_device() -> str:
    """Name the GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
