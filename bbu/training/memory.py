"""How much memory a training needs on each card and on the host, computed before anything is loaded.

It follows what the code allocates: parameters, gradients and optimizer states as DDP and DeepSpeed hold them, and the
tensors that autograd saves in the modules of transformers, at the longest row that the config allows. Not in it: what
CUDA, NCCL and the allocator take for themselves, `RESERVED_BYTES` and more. Importing this needs no torch.

S tokens and P patches of a row, H and I widths of a language layer and of its feed-forward block, W width of the vision
tower, D width of the head, V tokens in the vocabulary. All sizes are bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bbu.config.deepspeed import DeepSpeedPlan, check_deepspeed, deepspeed_plan
from bbu.config.flat import DirectConfig
from bbu.errors import ConfigError
from bbu.models.dimensions import ModelDimensions, count_low_rank, count_parameters, read_dimensions
from bbu.models.groups import BASE_GROUPS, stated_learning_rates
from bbu.resize import FACTOR

logger = logging.getLogger(__name__)
GB = 1e9
"""Bytes."""
RESERVED_BYTES = 1.5 * GB
"""What CUDA's context, its libraries and NCCL take on a card."""

_FLOAT = 4
"""Bytes of a float32 value."""
_MOMENT_BYTES = {
    "paged_": 0,  # CUDA moves it to the host where the card is full
    "ademamix_8bit": 3, "ademamix": 12, "lion_8bit": 1, "lion": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2, "adamw_torch_4bit": 1, "adamw_anyprecision": 4, "rmsprop_bnb_8bit": 1, "rmsprop": 4,
    "adagrad": 4, "adafactor": 0, "schedule_free_sgd": 4, "sgd": 0,
}  # fmt: skip
"""Bytes of state for each parameter, by the first name that the optimizer's begins with; others have Adam's two float32
values. A start is refused by it, so it is the least that the optimizer may hold on the card."""
_TEXT_TOKENS, _OBJECTS, _OBJECT_TOKENS, _CAPTION_TOKENS, _PROMPT_TOKENS = 390, 5, 42, 12, 100
"""What a photo brings besides its image: tokens of prompt and answer, objects, tokens of an object in the answer, and
of its description; tokens of the instruction. From the 391 real photos and Qwen's tokenizer."""
_LOSS_BYTES = 3 * _FLOAT
"""Of each logit in the backward pass: its log-probability, and the gradients of both the loss and the softmax."""
_LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters, DeepSpeed's default)."""


@dataclass(frozen=True)
class Row:
    """What one micro-batch holds."""

    tokens: int
    """Tokens, padding included."""
    images: int
    """Images, those of worked examples included."""
    students: int
    """Images that the head sees."""
    patches: int
    """Patches of all images."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one rank."""

    ranks: int
    """Number of ranks, one a card."""
    row: Row
    """The row for which the estimate holds."""
    states: Mapping[str, float]
    """What the card always holds: weights, gradients, the optimizer's state."""
    buckets: float
    """What the card holds to send gradients to other ranks or to the host."""
    passing: Mapping[str, float]
    """What the card holds besides at the fullest moment of the forward and backward pass."""
    step: float
    """What the card holds besides while the optimizer steps."""
    host: Mapping[str, float] = field(default_factory=dict)
    """What the host holds for this rank: the state of an offloaded optimizer."""

    @property
    def states_total(self) -> float:
        """What no setting of the batch changes."""
        return sum(self.states.values()) + self.buckets

    @property
    def rest(self) -> float:
        """What comes and goes within a step."""
        return max(sum(self.passing.values()), self.step)

    @property
    def total(self) -> float:
        """The most that the card holds at once."""
        return self.states_total + self.rest

    @property
    def host_total(self) -> float:
        """What the host holds for this rank."""
        return sum(self.host.values())


def estimate_memory(config: DirectConfig, dimensions: ModelDimensions, ranks: int) -> MemoryEstimate:
    """Estimate the memory of a training.

    Args:
        config: the run config.
        dimensions: those of the model's config.json.
        ranks: number of ranks, one a card.

    Raises:
        ConfigError: DeepSpeed is on, and its file cannot be read.
    """
    plan = deepspeed_plan(config.infrastructure) if config.infrastructure.deepspeed_enabled else None
    counts, precision = count_parameters(dimensions, config.detection), _precision(config)
    trained = _trained_counts(config, dimensions, counts)
    low_rank = sum(trained[group] for group in BASE_GROUPS if group in trained) if config.training.lora_rank else 0
    states, host = _states(config, plan, precision, ranks, sum(counts.values()) + low_rank, sum(trained.values()))
    row = _longest_row(config, dimensions)
    embedding = dimensions.embedding_parameters if "llm" in trained and not low_rank else 0
    return MemoryEstimate(
        ranks=ranks,
        row=row,
        states=states,
        buckets=_bucket_bytes(plan, precision, dimensions.width, embedding, sum(counts.values())),
        passing=_Pass(config, dimensions, precision, row, embedding).fullest_moment(),
        step=_step_bytes(config, plan, precision, ranks, max(trained.values(), default=0)),
        host=host,
    )


def announce_memory(config: DirectConfig, model_folder: Path, ranks: int, card_bytes: int | None) -> None:
    """Log what a training will need before it loads its model; does nothing where the folder has no config.json.

    Args:
        config: the run config.
        model_folder: the folder that the model is loaded from.
        ranks: number of ranks, one a card.
        card_bytes: memory of this rank's card; None without one.

    Raises:
        ConfigError: the states alone exceed the card, and memory_policy is refuse.
    """
    dimensions = read_dimensions(model_folder) or read_dimensions(config.model.model_path)  # adapters' base may move
    if dimensions is None:
        return
    estimate = estimate_memory(config, dimensions, ranks)
    logger.info("%s", describe_memory(estimate))
    if card_bytes is not None and (warning := check_card(estimate, card_bytes, config)):
        logger.warning("%s", warning)


def preview_memory(config: DirectConfig, ranks: Sequence[int]) -> str | None:
    """Show the estimates for some numbers of ranks; None where the model folder has no config.json.

    Raises:
        ConfigError: DeepSpeed is on, and its file contradicts the run config.
    """
    if config.infrastructure.deepspeed_enabled:
        check_deepspeed(config)
    dimensions = read_dimensions(config.model.model_path)
    return memory_table([estimate_memory(config, dimensions, count) for count in ranks]) if dimensions else None


def check_card(estimate: MemoryEstimate, card_bytes: int, config: DirectConfig) -> str | None:
    """Compare an estimate with a card.

    Returns:
        What to know where the estimate exceeds the card; None where it fits.

    Raises:
        ConfigError: the states alone exceed the card, so that no batch could fit, and memory_policy is refuse.
    """
    source, card, states = config.source, card_bytes / GB, (estimate.states_total + RESERVED_BYTES) / GB
    if states > card:
        problem = (
            f"{source}: weights, gradients and optimizer need {states:.1f} GB on each of {estimate.ranks} card(s), "
            f"which have {card:.1f} GB; use more cards with ZeRO-2 (configs/base_flat.yaml), or keep the optimizer in "
            "the host's memory (configs/one_card_40gb.yaml)"
        )
        if config.infrastructure.memory_policy == "refuse":
            raise ConfigError(problem)
        return problem
    total = (estimate.total + RESERVED_BYTES) / GB
    if total <= card:
        return None
    return (
        f"{source}: the fullest step may need {total:.1f} GB, the card has {card:.1f} GB; use more cards with ZeRO-2, "
        "set gradient_checkpointing to true and logits_chunk_size to 512, or lower max_total_length and max_pixels"
    )


def describe_memory(estimate: MemoryEstimate) -> str:
    """Say in a line what an estimate comes to."""
    host = f", and {estimate.host_total / GB:.1f} GB of the host's memory" if estimate.host else ""
    return (
        f"memory, estimated: {estimate.total / GB:.1f} GB on each of {estimate.ranks} card(s) "
        f"(states {estimate.states_total / GB:.1f}, rest {estimate.rest / GB:.1f}){host}, for rows of "
        f"{estimate.row.tokens} tokens with {estimate.row.patches} patches"
    )


def memory_table(estimates: Sequence[MemoryEstimate]) -> str:
    """Show estimates side by side, in GB of 10^9 bytes."""
    columns = [_table_rows(estimate) for estimate in estimates]
    names = list(dict.fromkeys(name for column in columns for name in column))
    header = "".join(f"{f'{e.ranks} card' + 's' * (e.ranks > 1):>10}" for e in estimates)
    lines = [f"{'GB on each card':<28}{header}"]
    for name in names:
        lines.append(f"{name:<28}" + "".join(f"{column.get(name, 0) / GB:>10.1f}" for column in columns))
    return "\n".join(lines)


def _table_rows(estimate: MemoryEstimate) -> dict[str, float]:
    host = {f"host: {name}": size for name, size in estimate.host.items()}
    host |= {"host": estimate.host_total} if host else {}
    return {
        **estimate.states,
        "buckets": estimate.buckets,
        "states": estimate.states_total,
        **{f"pass: {name}": size for name, size in estimate.passing.items()},
        "forward and backward pass": sum(estimate.passing.values()),
        "or the optimizer's step": estimate.step,
        "total": estimate.total,
        **host,
    }


def _longest_row(config: DirectConfig, dimensions: ModelDimensions) -> Row:
    """The longest micro-batch that a config allows, with as many of the largest images as usually fit into it."""
    data, training = config.data, config.training
    packed = data.collator_type == "packed"
    samples = 1 if packed else training.per_device_train_batch_size
    length = data.max_total_length if packed else config.model.model_max_length
    image_tokens = data.max_pixels // FACTOR**2
    images = max(1, length // (image_tokens + _TEXT_TOKENS)) * samples
    photos = 1 + data.teacher_ratio * data.num_teacher_samples  # images of a sample, on average
    patches = images * image_tokens * dimensions.merged_patches
    return Row(length * samples, images, math.ceil(images / photos), patches)


# --- states ---


@dataclass(frozen=True)
class _Precision:
    """Bytes of the values that a training holds."""

    weight: int
    gradient: int
    master: int
    """Of DeepSpeed's float32 copy of the weights."""
    computed: int
    """Of what a matrix product reads and writes."""
    stream: int
    """Of the states between two layers of the language model."""
    autocast: bool
    """Whether matrix products cast what they read."""


def _precision(config: DirectConfig) -> _Precision:
    mixed = config.training.bf16 or config.training.fp16
    if config.infrastructure.deepspeed_enabled:  # it casts the whole model
        size = 2 if mixed else _FLOAT
        return _Precision(weight=size, gradient=size, master=_FLOAT, computed=size, stream=size, autocast=False)
    size = _FLOAT if config.model.torch_dtype == "float32" else 2
    gradient = _FLOAT if config.training.lora_rank else size  # low-rank adapters and the head stay in float32
    return _Precision(
        weight=size,
        gradient=gradient,
        master=0,
        computed=2 if mixed else size,
        stream=size,
        autocast=mixed and size > 2,
    )


def _trained_counts(config: DirectConfig, d: ModelDimensions, counts: Mapping[str, int]) -> dict[str, int]:
    """Count the parameters that train, by learning-rate group; with lora_rank, those of the low-rank adapters."""
    t = config.training
    low_rank = count_low_rank(d, t.lora_rank) if t.lora_rank else {}
    rates = stated_learning_rates(t)
    return {group: low_rank.get(group, count) for group, count in counts.items() if rates[group] > 0}


def _states(
    config: DirectConfig, plan: DeepSpeedPlan | None, precision: _Precision, ranks: int, all_count: int, trained: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What the card and the host always hold.

    ZeRO (arXiv:1910.02054): stage 1 partitions the optimizer's state over the ranks, 2 the gradients too, 3 the
    weights too.
    """
    name = config.training.optim
    moments = next((size for part, size in _MOMENT_BYTES.items() if name.startswith(part)), 2 * _FLOAT)
    stage = plan.stage if plan else 0
    share = trained / (ranks if stage >= 1 else 1)
    weights = precision.weight * all_count / (ranks if stage == 3 else 1)
    gradients = precision.gradient * trained / (ranks if stage >= 2 else 1)
    host = {}
    if plan is not None and plan.offloads_weights:
        host, weights = {"weights": weights}, 0.0
    if plan is None or not plan.offloads_optimizer:
        master = precision.master * share
        return {"weights": weights, "gradients": gradients, "optimizer": master + moments * share}, host
    # DeepSpeed's host side: the float32 copy and its gradients, and the new weights on their way to the card. Where
    # gradients are accumulated, the host holds their sum as well.
    accumulated = precision.gradient * trained if config.training.gradient_accumulation_steps > 1 else 0
    host |= {
        "optimizer": (_FLOAT + moments) * share,
        "gradients": _FLOAT * share + accumulated,
        "new weights": precision.weight * share,
    }
    return {"weights": weights, "gradients": 0.0 if stage >= 2 else gradients, "optimizer": 0.0}, host


def _bucket_bytes(plan: DeepSpeedPlan | None, precision: _Precision, width: int, embedding: int, count: int) -> float:
    """What is held for communication. DDP needs nothing: gradients are views into its buckets."""
    if plan is None:
        return 0.0
    elements = plan.bucket_elements if plan.bucket_elements is not None else width**2
    buckets = precision.gradient * plan.buckets * min(elements, count)
    if plan.stage == 3:
        buckets += precision.weight * min(_LIVE_PARAMETERS, count)
    if plan.offloads_optimizer:
        buckets += precision.gradient * embedding  # temp_grad_buffer_for_gpu_offload, as large as the largest parameter
    return buckets


def _step_bytes(
    config: DirectConfig, plan: DeepSpeedPlan | None, precision: _Precision, ranks: int, largest_group: int
) -> float:
    """What the optimizer's step needs besides.

    DeepSpeed joins the gradients of one parameter group and casts them to float32. A fused step needs nothing, any
    other the square roots of the second moments of a group.
    """
    share = largest_group / (ranks if plan and plan.stage >= 1 else 1)
    roots = 0 if config.training.optim.endswith("fused") else _FLOAT
    if plan is None:
        return roots * share
    joined = precision.gradient if precision.gradient == _FLOAT else precision.gradient + _FLOAT
    return 0.0 if plan.offloads_optimizer else max(joined, _FLOAT + roots) * share


# --- forward and backward pass ---


@dataclass(frozen=True)
class _Pass:
    """What autograd saves in the forward pass of a row, and what the backward pass adds."""

    config: DirectConfig
    d: ModelDimensions
    p: _Precision
    row: Row
    embedding: int
    """Parameters of the token embedding if it is trained, else 0."""

    def fullest_moment(self) -> dict[str, float]:
        """The parts of the moment of the backward pass that needs most.

        It goes through captions, head, answers, language layers and vision layers, in this order, and frees each. The
        gradient of the token embedding is as large as the vocabulary, and comes in pieces of that size: one is added
        to the sum of those before it.
        """
        text, vision, head = self._text(), self._vision(), self._head()
        states = {"language model": text, "vision tower": vision}
        copies = self._weight_copies()
        answers, captions, waiting = self._logit_counts()
        one = self.p.gradient * self.embedding
        earlier = one if head or self.config.model.logits_chunk_size else 0
        two = 2 * one + (2 * self.embedding if self.p.autocast else 0)
        moments = (
            states | {"head": head, "logits": _LOSS_BYTES * captions + _FLOAT * waiting, "autocast copies": copies},
            states | {"head": head, "logits": _FLOAT * waiting, "embedding gradient": two, "autocast copies": copies},
            states | {"logits": _LOSS_BYTES * answers, "embedding gradient": earlier, "autocast copies": copies},
            states | {"logits": self.p.computed * answers, "embedding gradient": earlier + two - one,
                      "autocast copies": copies},
            states | {"one layer": self._text_layer(), "embedding gradient": one,
                      "autocast copies": copies + self._layer_copies()},
            {"vision tower": vision, "one layer": self._vision_layer(), "autocast copies": copies},
        )  # fmt: skip
        return max(moments, key=lambda parts: sum(parts.values()))

    # Between the layers.

    def _text(self) -> float:
        tokens, width, p = self.row.tokens, self.d.width, self.p
        ends = tokens * width * (p.stream + _FLOAT)  # the last norm
        if self.config.model.gradient_checkpointing:
            return ends + tokens * width * p.stream * self.d.layers
        return ends + self._text_saved() * self.d.layers

    def _vision(self) -> float:
        d, p, stream = self.d, self.p, self._vision_stream
        pixels = d.patch_values * (_FLOAT + (p.computed if p.computed != _FLOAT else 0))
        # The merger's norm and its two layers, of which the first is as wide as the joined patches.
        merger = d.vision_width * (_FLOAT + stream + 3 * p.computed)
        ends = self.row.patches * (pixels + merger)
        if self.config.model.gradient_checkpointing:
            return ends + self.row.patches * d.vision_width * stream * d.vision_layers
        return ends + self._vision_saved() * d.vision_layers

    # Within a layer: with checkpointing, one is computed again at a time.

    def _text_layer(self) -> float:
        saved = self._text_saved() if self.config.model.gradient_checkpointing else 0
        return saved + 2 * self.row.tokens * self.d.inner * self.p.computed

    def _vision_layer(self) -> float:
        saved = self._vision_saved() if self.config.model.gradient_checkpointing else 0
        return saved + 2 * self.row.patches * self.d.vision_inner * self.p.computed

    def _text_saved(self) -> float:
        """Saved by one language layer: two norms, queries, keys, values and their mix, four tensors of the MLP."""
        d, p = self.d, self.p
        norms = _norm_bytes(p.stream, p, readers=3) + _norm_bytes(p.stream, p, readers=2)
        # sdpa and eager get the keys and values once for each head of queries.
        repeated = self.config.model.attn_implementation in ("sdpa", "eager")
        attention = 2 * (d.width + (d.width if repeated else d.key_value_width)) * p.computed
        return self.row.tokens * (d.width * norms + attention + 4 * d.inner * p.computed)

    def _vision_saved(self) -> float:
        """Saved by one vision layer; the values are a part of the joint tensor of queries, keys and values."""
        d, p, stream = self.d, self.p, self._vision_stream
        norms = _norm_bytes(stream, p, readers=1) + _norm_bytes(stream, p, readers=2)
        return self.row.patches * (d.vision_width * (norms + 6 * p.computed) + 4 * d.vision_inner * p.computed)

    @property
    def _vision_stream(self) -> int:
        """Bytes of a state between two vision layers: under autocast, the patch embedding casts already."""
        return self.p.computed

    # The losses.

    def _logit_counts(self) -> tuple[int, int, int]:
        """Logits of answers, and of captions, that exist at once; and logits of answers that wait meanwhile."""
        answers = self.row.images * _OBJECTS * _OBJECT_TOKENS
        captions = self.row.students * _OBJECTS * _CAPTION_TOKENS if self.config.detection.detection_enabled else 0
        if chunk := self.config.model.logits_chunk_size:
            return self.d.vocab * min(chunk, answers), self.d.vocab * min(chunk, captions), 0
        return self.d.vocab * answers, self.d.vocab * captions, self.d.vocab * answers

    def _head(self) -> float:
        """The detection head: its adapters at each patch of the students' images, its layers' keys and biases."""
        config, p = self.config.detection, self.p
        if not config.detection_enabled:
            return 0.0
        patches = self.row.patches // self.row.images
        width, words = config.detection_hidden_dim, _PROMPT_TOKENS if config.detection_use_language_memory else 0
        queries = config.detection_num_queries + config.detection_denoising_queries
        adapter = self.d.vision_width * (2 * p.weight + (p.computed if p.autocast else 0))
        adapter += 2 * config.detection_adapter_dim * p.computed + 4 * width * p.computed
        keys = (patches + words) * width * 3 * p.computed
        # The bias of each query at each key, and the hidden layer (32 wide) that computes it for each row and column.
        bias = config.detection_num_heads * queries * (patches + words)
        hidden = 2 * queries * math.isqrt(patches) * 32
        states = queries * (14 * width + 2 * config.detection_ffn_dim)
        layers = config.detection_num_layers * (keys + (bias + hidden + states) * p.computed)
        # The backward pass of a layer needs the gradient of its bias, before and after the mask.
        return self.row.students * (patches * adapter + layers + 2 * bias * p.computed)

    # Autocast's copies of the weights; without its cache, each lives as long as the backward pass needs it.

    def _weight_copies(self) -> float:
        if not self.p.autocast:
            return 0.0
        counts = count_parameters(self.d, self.config.detection)
        outside = counts["merger"] + counts["detection"] + counts["adapter"]
        if self.config.model.gradient_checkpointing:
            return 2 * outside
        return 2 * (outside + counts["vision"] + self.d.layers * self.d.layer_parameters)

    def _layer_copies(self) -> float:
        needed = self.p.autocast and self.config.model.gradient_checkpointing
        return 2 * self.d.layer_parameters if needed else 0.0


def _norm_bytes(stream: int, p: _Precision, readers: int) -> int:
    """Saved by an RMSNorm for each value: its input in float32, the normalised value, and what is read of it.

    transformers normalises in float32. Under autocast, each of the `readers` (linear layers) casts for itself.
    """
    return _FLOAT + stream + (readers * p.computed if p.autocast else stream)
