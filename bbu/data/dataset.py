"""Makes samples of JSONL records: draws teachers, decodes images, writes the conversation.

A sample is a function of (seed, epoch, index) alone, never of the state of a worker or a rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.config.domains import DataConfig, LongSamplePolicy
from bbu.data.chat import Chat, ChatBuilder, Turn, check_placeholders, format_answer, reading_order
from bbu.data.images import ImagePreparer, Pixels, RgbImage, load_rgb, read_size, size_of
from bbu.data.packing import SampleCost
from bbu.data.prompts import Prompt, get_prompt
from bbu.data.records import RecordsFile, read_pool, read_split
from bbu.data.token_counts import OnRank0, compute_here, costs_of_file
from bbu.data.types import Sample
from bbu.errors import DataError
from bbu.resize import ResizePlan
from bbu.run.provenance import computing_code_hash
from bbu.schema import BBUObject, Record, Role, View

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]
_COSTING_CODE = ("data/chat.py", "data/dataset.py", "data/images.py", "boxes.py", "resize.py", "schema.py")
"""The code that decides how many tokens and patches a view has."""


class SampleBuilder:
    """Makes samples of views, with one config, tokenizer, image processor and prompt."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        processor: Qwen2VLImageProcessorPil,
        prompt: Prompt,
    ) -> None:
        self._root = Path(config.data_root)
        self._sort = config.object_order == "reading"
        self._chat = ChatBuilder(tokenizer)
        self._images = ImagePreparer(processor, config.min_pixels, config.max_pixels)
        self._prompt = prompt
        self._system_tokens = len(self._chat.build(prompt.system, ()).ids)
        # By identity, since hashing a view takes as long as everything else about its cost.
        self._costs: dict[int, tuple[View, SampleCost]] = {}

    def build(self, name: str, student: View, teachers: Sequence[View] = ()) -> Sample:
        """Build one sample with its answers.

        Args:
            name: of the sample, for messages.
            student: the view to learn from.
            teachers: views that come before it as worked examples.

        Raises:
            DataError: names the sample; an image is missing or damaged, or does not match its record.
        """
        views: list[tuple[Role, View]] = [*(("teacher", t) for t in teachers), ("student", student)]
        pixels = [self._load(name, view) for _, view in views]
        objects = [self._objects(name, v, p.plans[0]) for (_, v), p in zip(views, pixels, strict=True)]
        turns = [
            self._turn(role, p.plans, format_answer(o)) for (role, _), p, o in zip(views, pixels, objects, strict=True)
        ]
        chat = self._chat.build(self._prompt.system, turns)
        return self._sample(name, chat, pixels, objects[-1])

    def build_question(
        self,
        name: str,
        images: Sequence[RgbImage],
        instruction: str | None = None,
        teachers: Sequence[View] = (),
    ) -> Sample:
        """Build a sample whose student turn has no answer yet, about images in memory.

        Args:
            name: of the sample, for messages.
            images: the images of the student.
            instruction: replaces the prompt's instruction.
            teachers: views that come before it as worked examples.

        Raises:
            DataError: names the sample; an image has an impossible size, or that of a teacher is missing or damaged.
        """
        examples = [self._load(name, view) for view in teachers]
        question = self._prepare(name, images)
        turns = [
            self._turn("teacher", pixels.plans, format_answer(self._objects(name, view, pixels.plans[0])))
            for view, pixels in zip(teachers, examples, strict=True)
        ]
        turns.append(self._turn("student", question.plans, None, instruction))
        return self._sample(name, self._chat.build(self._prompt.system, turns), [*examples, question], ())

    def caption_lengths(self, descriptions: Sequence[str]) -> list[int]:
        """Number of tokens of each description, the end token included."""
        return [count + 1 for count in self._chat.count_tokens(descriptions)]

    def cost(self, name: str, student: View, teachers: Sequence[View] = ()) -> SampleCost:
        """Tokens and patches of the sample that `build` would make, without decoding an image.

        Turns are tokenised one by one, so a view costs the same in every sample and is measured once.
        """
        costs = [self._view_cost(name, view) for view in (*teachers, student)]
        return SampleCost(self._system_tokens + sum(c.tokens for c in costs), sum(c.patches for c in costs))

    def measure_views(self, named: Sequence[tuple[str, View]]) -> list[SampleCost]:
        """Measure what the turn of each view costs, all at once.

        Args:
            named: views, each with the name of its sample for messages.

        Raises:
            DataError: names the sample; an image or a box is impossible, or an image whose size is not recorded is
                missing.
        """
        plans = [[self._plan(name, view, i) for i in range(len(view.images))] for name, view in named]
        answers = [format_answer(self._objects(name, view, p[0])) for (name, view), p in zip(named, plans, strict=True)]
        tokens = self._chat.count_tokens(answers)
        question_tokens = cache(self._question_tokens)
        return [
            SampleCost(
                question_tokens(tuple(plan.placeholders for plan in plans_of_view)) + count,
                sum(math.prod(plan.grid) for plan in plans_of_view),
            )
            for plans_of_view, count in zip(plans, tokens, strict=True)
        ]

    def remember_costs(self, views: Iterable[View], costs: Iterable[SampleCost]) -> None:
        """Take the costs of views that `measure_views` has measured, here or on another rank."""
        self._costs |= {id(view): (view, cost) for view, cost in zip(views, costs, strict=True)}

    def cost_fingerprint(self) -> str:
        """SHA-256 over all that a view's cost depends on, but for the view: tokenizer, prompt, limits and code."""
        facts = [self._prompt.system, self._prompt.instruction, self._sort, *self._images.settings]
        facts += [self._chat.describe_tokenizer(), computing_code_hash(_COSTING_CODE)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _question_tokens(self, placeholders: tuple[int, ...]) -> int:
        """Tokens of a turn with an answer of none."""
        turn = Turn("student", placeholders, self._prompt.instruction, "")
        return len(self._chat.build(self._prompt.system, [turn]).ids) - self._system_tokens

    def _view_cost(self, name: str, view: View) -> SampleCost:
        remembered = self._costs.get(id(view))
        if remembered is None or remembered[0] is not view:  # another view may have had its id
            remembered = self._costs[id(view)] = (view, self.measure_views([(name, view)])[0])
        return remembered[1]

    def _plan(self, name: str, view: View, index: int) -> ResizePlan:
        size = self._size(name, view, index)
        try:
            return self._images.plan(*size)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _turn(
        self, role: Role, plans: Sequence[ResizePlan], answer: str | None, instruction: str | None = None
    ) -> Turn:
        return Turn(role, tuple(p.placeholders for p in plans), instruction or self._prompt.instruction, answer)

    def _load(self, name: str, view: View) -> Pixels:
        images = [load_rgb(self._root / path, name) for path in view.images]
        width, height = size_of(images[0])
        if view.width is not None and (width, height) != (view.width, view.height):
            raise DataError(
                f"{name}: {view.images[0]} is {width}x{height} pixels but the record says {view.width}x{view.height}; "
                "convert again"
            )
        return self._prepare(name, images)

    def _prepare(self, name: str, images: Sequence[RgbImage]) -> Pixels:
        try:
            return self._images.prepare(images)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _size(self, name: str, view: View, index: int) -> tuple[int, int]:
        if index == 0 and view.width is not None and view.height is not None:
            return view.width, view.height
        return read_size(self._root / view.images[index], name)

    def _objects(self, name: str, view: View, plan: ResizePlan) -> tuple[BBUObject, ...]:
        """Objects in pixels of the image as the model sees it; the boxes of a view belong to its first image."""
        for item in view.objects:
            if item.bbox_2d[2] > plan.source_width or item.bbox_2d[3] > plan.source_height:
                size = f"{plan.source_width}x{plan.source_height}"
                raise DataError(f"{name}: box {list(item.bbox_2d)} leaves the {size} image; convert again")
        moved = tuple(BBUObject(plan.to_resized(o.bbox_2d), o.desc) for o in view.objects)
        return reading_order(moved) if self._sort else moved

    def _sample(self, name: str, chat: Chat, pixels: Sequence[Pixels], objects: tuple[BBUObject, ...]) -> Sample:
        patches = pixels[0].patches if len(pixels) == 1 else torch.cat([p.patches for p in pixels])  # cat always copies
        grid = torch.cat([p.grid for p in pixels])
        check_placeholders(chat, grid, len(patches), self._images.merge_size, name)
        student = pixels[-1].plans[0]
        return Sample(
            name=name,
            input_ids=torch.tensor(chat.ids),
            labels=chat.labels(),
            mm_token_type_ids=chat.mm_token_type_ids(),
            pixel_values=patches,
            image_grid_thw=grid,
            answers=tuple(chat.answers),
            images=tuple(chat.images),
            objects=objects,
            captions=tuple(self._chat.caption(item.desc) for item in objects),
            image_size=(student.width, student.height),
        )


class BBUDataset(Dataset[Sample]):
    """Samples of a list of records; the epoch that is set decides which teachers a sample gets."""

    def __init__(
        self,
        records: Sequence[tuple[str, Record]],
        pool: Sequence[View],
        builder: SampleBuilder,
        *,
        teacher_ratio: float,
        num_teachers: int,
        max_length: int,
        seed: int,
    ) -> None:
        self._records, self._pool, self._builder = records, pool, builder
        self._teacher_ratio, self._num_teachers = teacher_ratio, num_teachers
        self._max_length, self._seed = max_length, seed
        # In shared memory: persistent workers have a copy of this object, and must still see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._pool_positions: dict[str, list[int]] = {}
        """Image → where the pool has it."""
        for position, view in enumerate(pool):
            for image in view.images:
                self._pool_positions.setdefault(image, []).append(position)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        name, record = self._records[index]
        return self._builder.build(name, record.student, self.teachers(index))

    def students(self) -> Iterator[tuple[str, View]]:
        """Name and view of every student, without decoding an image."""
        return ((name, record.student) for name, record in self._records)

    def caption_lengths(self, descriptions: Sequence[str]) -> list[int]:
        """Number of tokens of each description as the caption branch writes it, the end token included."""
        return self._builder.caption_lengths(descriptions)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose teachers are drawn; the sampler calls this before each epoch."""
        self._epoch.fill_(epoch)

    def cost(self, index: int, epoch: int) -> SampleCost:
        """Tokens and patches of sample `index` in an epoch, without decoding its images."""
        return self._choose_teachers(index, epoch)[1]

    def teachers(self, index: int, epoch: int | None = None) -> tuple[View, ...]:
        """The teachers of sample `index`: those of its record, otherwise some drawn from the pool.

        Only as many as fit into the maximal length, in this order.

        Args:
            index: of the sample.
            epoch: the epoch to draw for; None for the one that is set.
        """
        return self._choose_teachers(index, int(self._epoch) if epoch is None else epoch)[0]

    def _choose_teachers(self, index: int, epoch: int) -> tuple[tuple[View, ...], SampleCost]:
        """The teachers of a sample, and what it costs with them."""
        name, record = self._records[index]
        chosen = self._draw_teachers(index, record.student, epoch) if record.teachers is None else record.teachers
        cost = self._builder.cost(name, record.student, chosen)
        while chosen and cost.tokens > self._max_length:
            chosen = chosen[:-1]
            cost = self._builder.cost(name, record.student, chosen)
        return tuple(chosen), cost

    def _draw_teachers(self, index: int, student: View, epoch: int) -> list[View]:
        """Draw from the pool, for a share of `teacher_ratio` of the samples; a student is never its own teacher."""
        rng = random.Random(f"{self._seed}/{epoch}/{index}")
        if rng.random() >= self._teacher_ratio:
            return []
        students = sorted({position for image in student.images for position in self._pool_positions.get(image, ())})
        others = len(self._pool) - len(students)
        drawn = rng.sample(range(others), min(self._num_teachers, others))
        return [self._pool[_skip_positions(number, students)] for number in drawn]


def _skip_positions(number: int, skipped: Sequence[int]) -> int:
    """The position of the item with this number where some positions, in rising order, are not counted."""
    for position in skipped:
        number += position <= number
    return number


def load_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    processor: Qwen2VLImageProcessorPil,
    *,
    split: Split,
    seed: int,
    max_length: int,
    on_rank_0: OnRank0 = compute_here,
) -> BBUDataset:
    """Load the dataset of a split and check its records.

    Args:
        config: files, prompt, teachers and what happens to long samples.
        tokenizer, processor: of the model.
        split: train or eval.
        seed: of the draw of teachers.
        max_length: most tokens of a sample.
        on_rank_0: has rank 0 compute something, and gives the result, or the error, to all ranks. Photos are looked at,
            and tokens counted, by rank 0 alone.

    Raises:
        DataError: a record is malformed, an image is missing, or a student alone is too long.
        ConfigError: there is no such prompt.
    """
    train = split == "train"
    style = config.train_prompt if train else config.eval_prompt
    builder = SampleBuilder(config, tokenizer, processor, get_prompt(config.language, style))
    ratio = config.teacher_ratio if train else config.eval_teacher_ratio
    file = read_split(config, train)
    pool = read_pool(config) if ratio > 0 and config.num_teacher_samples > 0 else None
    _measure_once([file] if pool is None else [file, pool], builder, on_rank_0)
    return BBUDataset(
        _fitting_records(file.records, builder, max_length, config.long_sample_policy),
        [] if pool is None else [record.student for _, record in pool.used],
        builder,
        teacher_ratio=ratio,
        num_teachers=config.num_teacher_samples,
        max_length=max_length,
        seed=seed,
    )


def _measure_once(files: Sequence[RecordsFile], builder: SampleBuilder, on_rank_0: OnRank0) -> None:
    """Have rank 0 check the photos of some files and measure their views, and take the costs over on every rank."""
    costs_of_files = on_rank_0(lambda: [_check_and_measure(file, builder) for file in files])
    for file, costs in zip(files, costs_of_files, strict=True):
        builder.remember_costs((view for _, view in file.views()), costs)


def _check_and_measure(file: RecordsFile, builder: SampleBuilder) -> list[SampleCost]:
    """Check the photos of a file's records, and measure what their views cost."""
    file.check_photos()
    return costs_of_file(file, builder.measure_views, builder.cost_fingerprint)


def _fitting_records(
    records: list[tuple[str, Record]], builder: SampleBuilder, max_length: int, policy: LongSamplePolicy
) -> list[tuple[str, Record]]:
    """Return the records whose student alone fits; longer ones are refused, or dropped with a warning, by name."""
    lengths = [builder.cost(name, record.student).tokens for name, record in records]
    long = [f"{name} ({n} tokens)" for (name, _), n in zip(records, lengths, strict=True) if n > max_length]
    if long and policy == "refuse":
        raise DataError(
            f"{len(long)} of {len(records)} samples exceed model_max_length {max_length}: {', '.join(long[:5])}; "
            "raise it, lower max_pixels, or set long_sample_policy to drop"
        )
    if long:
        logger.warning("dropped %d samples over %d tokens: %s", len(long), max_length, ", ".join(long))
    return [pair for pair, length in zip(records, lengths, strict=True) if length <= max_length]
