"""The five domains of a run config: the single source of every key, its type, its rule and its meaning.

No field has a default: a config states all of them. The type of a field carries the rule of its values and what the
key is used for (see `bbu.config.kinds`); the string under a field is its documentation. Nothing mutates a domain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_type_hints

from bbu.config.kinds import (
    CONVERSION,
    SCORE,
    SHARD,
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    Purpose,
    Rule,
    Share,
    UsedFor,
    pattern_rule,
    range_rule,
)
from bbu.config.optimizers import OPTIMIZERS, optimizer_package
from bbu.labels import ResponseType

Attention = Literal["flash_attention_2", "varlen", "sdpa", "eager"]
Strategy = Literal["steps", "epoch", "no"]
Language = Literal["zh", "en"]
PromptStyle = Literal["detailed", "concise"]
CollatorType = Literal["standard", "packed"]
LongSamplePolicy = Literal["refuse", "drop"]

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                    "inverse_sqrt"]  # fmt: skip
"""The schedules of transformers that follow from the step alone, and need no settings for which there are no keys."""
_COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def _has_one_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False


_COCO = Rule("be one of COCO's thresholds 0.5, 0.55, … 0.95", lambda value: round(value, 4) in _COCO_THRESHOLDS)
_StepsOrShare = Annotated[
    int | float,
    Rule(
        "be a whole number of steps, or a share of the run below 1",
        lambda v: v > 0 and (v < 1 or float(v).is_integer()),
    ),
]
_ONE_TOKEN = Rule("be at least 784, one token of 28x28 pixels", lambda pixels: pixels >= 28 * 28)
_OPTIMIZER = Rule(
    f"be an optimizer of transformers, such as {', '.join(OPTIMIZERS)}",
    lambda name: name in OPTIMIZERS or optimizer_package(name) is not None,
    OPTIMIZERS,
)
_NOT_EMPTY = Rule("not be empty", bool)
_ONE_GROUP = Rule("be a regular expression with one group", _has_one_group)
_RUN_NAME = pattern_rule(
    r"[A-Za-z0-9][A-Za-z0-9._-]*", "hold letters, digits, '.', '_' and '-' only, and begin with a letter or digit"
)


@dataclass(frozen=True)
class ModelConfig:
    """Which Qwen2.5-VL, and how it computes."""

    model_path: str
    """Folder of a Qwen2.5-VL model (config, weights, tokenizer, image processor); read offline."""
    model_max_length: PositiveInt
    """Longest sequence, in tokens; long_sample_policy says what happens to a longer sample."""
    attn_implementation: Annotated[Attention, SCORE]
    """Attention of the language model."""
    vision_attn_implementation: Annotated[Attention, SCORE]
    """Attention of the vision tower."""
    torch_dtype: Annotated[Literal["float32", "bfloat16", "float16"], SCORE]
    """Dtype of the loaded weights; below float32, training needs DeepSpeed or lora_rank above 0."""
    tf32: bool
    """Let float32 matrix products use TF32 on GPUs that have it."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass to save memory."""
    logits_chunk_size: NotNegativeInt
    """Positions of answers, or of captions, whose logits are computed at once; 0 computes all at once."""
    generation_max_new_tokens: Annotated[PositiveInt, SCORE]
    """Longest generated answer, in tokens."""
    generation_batch_size: PositiveInt
    """Images in one batch of inference and evaluation."""
    generation_repetition_penalty: Annotated[PositiveFloat, SCORE]
    """Repetition penalty of greedy decoding; 1.0 is none."""


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: duration, learning rates, loss weights, checkpoints and validation."""

    num_train_epochs: float
    """Passes over the training set; ignored where max_steps is positive."""
    max_steps: int
    """Optimizer steps; -1 lets num_train_epochs decide."""
    per_device_train_batch_size: PositiveInt
    """Samples per rank and micro-batch."""
    per_device_eval_batch_size: PositiveInt
    """Samples per rank and batch when the validation loss is computed."""
    gradient_accumulation_steps: PositiveInt
    """Micro-batches per optimizer step."""
    vision_lr: NotNegativeFloat
    """Learning rate of the vision tower; 0 freezes it."""
    merger_lr: NotNegativeFloat
    """Learning rate of the vision-to-language merger; 0 freezes it."""
    llm_lr: NotNegativeFloat
    """Learning rate of the language model; 0 freezes it."""
    detection_lr: NotNegativeFloat
    """Learning rate of the detection head's decoder and branches; 0 freezes them."""
    adapter_lr: NotNegativeFloat
    """Learning rate of the detection head's input adapters; 0 freezes them."""
    lora_rank: NotNegativeInt
    """Rank of the low-rank adapters (LoRA) that are trained in place of the model's weights; 0 trains the weights.
    Adapters go to all linear layers of the groups vision, merger and llm whose rate is above 0: all layers rather than
    attention alone (Dettmers et al. 2023, arXiv:2305.14314, section 4), the tower and the merger too because the
    detection head reads their patches. The head itself is trained whole."""
    lora_alpha: PositiveInt
    """The adapters' output is scaled by lora_alpha over lora_rank."""
    lora_dropout: Share
    """Dropout of the adapters' input."""
    weight_decay: NotNegativeFloat
    """AdamW weight decay; norms and biases are excluded."""
    optim: Annotated[str, _OPTIMIZER]
    """Optimizer, by its name in transformers, for example adamw_torch_fused."""
    adam_beta1: Share
    """First-moment decay of AdamW."""
    adam_beta2: Share
    """Second-moment decay of AdamW."""
    adam_epsilon: PositiveFloat
    """Term added to the denominator of AdamW's update."""
    max_grad_norm: NotNegativeFloat
    """Global gradient norm above which gradients are clipped; 0 never clips."""
    lr_scheduler_type: Scheduler
    """Learning-rate schedule, by its name in transformers."""
    warmup_ratio: Share
    """Share of the optimizer steps spent warming up; used where warmup_steps is 0."""
    warmup_steps: NotNegativeInt
    """Optimizer steps spent warming up; 0 lets warmup_ratio decide."""
    auto_scale_lr: bool
    """Scale all learning rates by global batch size over lr_reference_batch_size."""
    lr_reference_batch_size: PositiveInt
    """Global batch size for which the stated learning rates hold."""
    bf16: Annotated[bool, SCORE]
    """Mixed precision in bfloat16."""
    fp16: bool
    """Mixed precision in float16."""
    seed: int
    """Seed of initialisation and dropout."""
    data_seed: int
    """Seed of data order and teacher draws."""
    teacher_loss_weight: NotNegativeFloat
    """Weight of the language loss on teachers' answers."""
    student_loss_weight: NotNegativeFloat
    """Weight of the language loss on students' answers."""
    save_strategy: Strategy
    """When to write a checkpoint."""
    save_steps: _StepsOrShare
    """Optimizer steps between checkpoints under save_strategy steps; below 1 a share of the run's steps."""
    save_total_limit: NotNegativeInt
    """Checkpoints kept, newest first by step; 0 keeps all."""
    save_final: bool
    """Write a checkpoint at the end of training under every save_strategy."""
    eval_strategy: Strategy
    """When to compute the validation loss."""
    eval_steps: _StepsOrShare
    """Optimizer steps between validation losses under eval_strategy steps; below 1 a share of the run's steps."""
    logging_steps: PositiveInt
    """Optimizer steps between log lines; the length of the averaging window."""
    log_weight_norms: bool
    """Write wn/<group>, the weight norm of each parameter group."""
    log_grad_norms: bool
    """Write gn/<group>, the gradient norm of each parameter group."""
    resume: Literal["auto", "never"]
    """auto resumes from the newest checkpoint that verifies; never starts from model_path."""
    nan_policy: Literal["stop", "skip"]
    """What to do on a non-finite loss or gradient: stop the run, or skip the optimizer step."""
    nan_max_skips: NotNegativeInt
    """Consecutive skipped steps after which nan_policy skip stops the run."""
    eval_iou_threshold: Annotated[float, _COCO, SCORE]
    """Lowest IoU with an object at which a prediction counts as correct in the headline score."""
    eval_bootstrap_samples: Annotated[NotNegativeInt, SCORE]
    """Bootstrap resamples of the validation set for confidence intervals; 0 computes none."""
    eval_bootstrap_confidence: Annotated[Share, SCORE]
    """Confidence level of the bootstrap intervals."""


@dataclass(frozen=True)
class DataConfig:
    """From vendor files to batches: conversion, conversations, collation and loading."""

    vendor_dir: Annotated[str, CONVERSION, SHARD]
    """Folder of vendor JSON and JPEG pairs, read recursively."""
    data_root: Annotated[str, CONVERSION]
    """Folder that conversion writes and training reads; paths in records are relative to it."""
    train_file: Annotated[str, CONVERSION]
    """Training records, relative to data_root."""
    val_file: Annotated[str, CONVERSION]
    """Validation records, relative to data_root."""
    teacher_file: Annotated[str, CONVERSION]
    """Records of the worked examples (the teacher pool), relative to data_root."""
    image_folder: Annotated[str, CONVERSION, SHARD]
    """Folder of resized images, relative to data_root."""
    min_pixels: Annotated[int, _ONE_TOKEN, CONVERSION, SHARD, SCORE]
    """Fewest pixels of a resized image."""
    max_pixels: Annotated[PositiveInt, CONVERSION, SHARD, SCORE]
    """Most pixels of a resized image."""
    jpeg_quality: Annotated[int, range_rule(1, 95), CONVERSION, SHARD]
    """JPEG quality of resized images; Pillow advises against more than 95."""
    exif_frame: Annotated[Literal["auto", "upright", "stored"], CONVERSION, SHARD]
    """Which pixels the vendor's boxes refer to where EXIF turns a photo: upright as shown, stored as in the file, or
    auto: decided by the vendor's width and height and, where these cannot, by the other photos."""
    response_types: Annotated[list[ResponseType], _NOT_EMPTY, CONVERSION, SCORE]
    """Levels of a description, in the order in which it names them."""
    token_map_file: Annotated[str, CONVERSION]
    """YAML file that renames labels: a name under configs/labels or a path."""
    label_hierarchy_file: Annotated[str, CONVERSION, SCORE]
    """YAML file of allowed object types and properties: a name under configs/labels or a path."""
    unknown_label_policy: Annotated[Literal["drop", "ignore", "refuse"], CONVERSION]
    """What to do with a label outside the hierarchy: drop it as a reject, ignore it as left out on purpose, or refuse
    the conversion."""
    site_pattern: Annotated[str, _ONE_GROUP, CONVERSION]
    """Regular expression whose first group, searched in a photo's file stem, names its site."""
    val_ratio: Annotated[Share, CONVERSION]
    """Share of sites that go to validation, as an expectation: each site's own hash decides."""
    split_seed: Annotated[int, CONVERSION]
    """Seed of the split by site."""
    teacher_pool_size: Annotated[NotNegativeInt, CONVERSION]
    """Worked examples put into the teacher pool."""
    max_reject_share: Annotated[Share, CONVERSION]
    """Share of rejected photos, or of rejected objects, above which conversion exits with an error."""
    min_visible_ratio: Annotated[Share, CONVERSION, SHARD]
    """Share of a box that must lie inside the image; a box with less inside is dropped."""
    min_box_side: Annotated[NotNegativeFloat, CONVERSION, SHARD]
    """Shortest side of a box, in pixels of the resized image; a shorter side is widened to it."""
    remove_duplicates: Annotated[bool, CONVERSION, SHARD]
    """Drop exact duplicates of an object; the report counts them."""
    keep_negatives: Annotated[bool, CONVERSION]
    """Keep photos without objects, as negatives."""
    emptied_photo_policy: Annotated[Literal["set_aside", "negative"], CONVERSION]
    """What to do with a photo all of whose objects were rejected: set it aside, or treat it as one without objects."""
    convert_processes: NotNegativeInt
    """Processes of the conversion pool; 0 uses all cores."""
    max_examples: int
    """Training records used; -1 uses all."""
    max_eval_examples: Annotated[int, SCORE]
    """Validation records used; -1 uses all."""
    teacher_ratio: Share
    """Share of training samples that get worked examples before the student."""
    num_teacher_samples: NotNegativeInt
    """Worked examples before the student, in the samples that get any."""
    eval_teacher_ratio: Share
    """Share of validation samples that get worked examples before the student."""
    language: Annotated[Language, CONVERSION, SCORE]
    """Language of the prompts, and of the vendor labels that conversion reads."""
    train_prompt: PromptStyle
    """Prompt of training."""
    eval_prompt: Annotated[PromptStyle, SCORE]
    """Prompt of inference and evaluation."""
    object_order: Annotated[Literal["reading", "source"], SCORE]
    """Order of objects in an answer: reading (top to bottom, left to right) or source (as in the record)."""
    collator_type: CollatorType
    """standard pads the samples of a batch; packed concatenates them."""
    max_total_length: PositiveInt
    """Longest packed sequence, in tokens."""
    packing_buffer_size: PositiveInt
    """Samples that are packed into sequences together."""
    packing_balance_vision_weight: float
    """Cost of a vision patch relative to a language token when packed sequences are balanced over ranks."""
    long_sample_policy: LongSamplePolicy
    """What to do with a sample longer than model_max_length: refuse the run, or drop the sample with a warning."""
    pad_to_multiple_of: PositiveInt
    """Padded lengths are multiples of this, in tokens."""
    shuffle: bool
    """Shuffle the training set each epoch."""
    dataloader_num_workers: NotNegativeInt
    """Worker processes of a DataLoader; 0 loads in the main process."""
    dataloader_prefetch_factor: PositiveInt
    """Batches that each worker loads ahead."""
    dataloader_pin_memory: bool
    """Keep batches in page-locked memory, for faster copies to a GPU."""
    dataloader_persistent_workers: bool
    """Keep the worker processes between epochs."""
    dataloader_drop_last: bool
    """Drop the last incomplete batch of an epoch."""


@dataclass(frozen=True)
class DetectionConfig:
    """The DETR-style head, its matcher and its losses."""

    detection_enabled: bool
    """Train and use the detection head."""
    detection_num_queries: PositiveInt
    """Object queries; must exceed the largest number of objects in a photo."""
    detection_hidden_dim: PositiveInt
    """Width of the decoder's states."""
    detection_num_layers: PositiveInt
    """Decoder layers."""
    detection_num_heads: PositiveInt
    """Attention heads of a decoder layer."""
    detection_ffn_dim: PositiveInt
    """Width of a decoder layer's feed-forward block."""
    detection_dropout: Share
    """Dropout in the decoder."""
    detection_adapter_dim: PositiveInt
    """Hidden width of the adapters from the model's states to the decoder."""
    detection_use_language_memory: bool
    """Let queries attend to the prompt's language states beside the image."""
    detection_detach_memory: bool
    """Stop the head's gradients before they reach the vision tower and the language model."""
    detection_freeze_epochs: NotNegativeFloat
    """Epochs during which the head is frozen at the start."""
    detection_caption_layers: PositiveInt
    """Layers of the caption decoder."""
    detection_caption_max_length: PositiveInt
    """Longest caption, in tokens."""
    detection_caption_dropout: Share
    """Dropout in the caption decoder."""
    detection_bbox_weight: float
    """Weight of the L1 box loss."""
    detection_giou_weight: float
    """Weight of the GIoU loss."""
    detection_objectness_weight: float
    """Weight of the focal objectness loss."""
    detection_caption_weight: float
    """Weight of the caption loss."""
    detection_aux_weight: float
    """Weight of the losses of all decoder layers but the last."""
    detection_loss_weight: float
    """Weight of the head's whole loss relative to the language loss."""
    detection_cost_bbox: float
    """L1 box term of the matching cost."""
    detection_cost_giou: float
    """GIoU term of the matching cost."""
    detection_cost_objectness: float
    """Objectness term of the matching cost."""
    detection_focal_alpha: Share
    """Weight of matched against unmatched queries in the focal loss."""
    detection_focal_gamma: float
    """Focusing exponent of the focal loss."""
    detection_prior_prob: Share
    """Objectness that an untrained head predicts; sets the initial bias."""
    detection_denoising_queries: NotNegativeInt
    """Denoising queries per sample, as in DINO; 0 uses none."""
    detection_denoising_noise: float
    """Box noise of denoising queries, as a share of box size."""
    detection_score_threshold: Annotated[Share, SCORE]
    """Lowest objectness at which inference reports a query."""
    detection_max_predictions: Annotated[PositiveInt, SCORE]
    """Most objects reported per image by the head."""


@dataclass(frozen=True)
class InfrastructureConfig:
    """The run folder, logs, processes and distributed settings of a run."""

    run_name: Annotated[str, _RUN_NAME]
    """Name of the run; its folder is output-{run_name}."""
    output_root: str
    """Folder that holds run folders."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    """Lowest level that is logged."""
    log_verbose: bool
    """Log all components at log_level, not only those of the summary."""
    progress: Literal["auto", "bar", "lines", "off"]
    """Progress display; auto shows a bar on a terminal and lines elsewhere."""
    tensorboard: bool
    """Write TensorBoard event files."""
    deepspeed_enabled: bool
    """Train with DeepSpeed; the variable BBU_DEEPSPEED_ENABLED overrides it."""
    deepspeed_config: str
    """DeepSpeed JSON; the variable BBU_DEEPSPEED_CONFIG overrides it."""
    distributed_backend: Literal["auto", "nccl", "gloo"]
    """Backend of the collectives between ranks; auto takes nccl with GPUs, else gloo."""
    distributed_timeout_s: PositiveInt
    """Seconds a collective may wait for the slowest rank."""
    cpu_threads: NotNegativeInt
    """Threads of torch on the CPU; 0 lets torch choose."""
    shape_checks: bool
    """Check the shapes of tensors against the annotations at module boundaries."""
    status_interval_s: PositiveFloat
    """Seconds between two heartbeats in status.json."""
    lease_timeout_s: PositiveFloat
    """Seconds without a heartbeat after which another trainer may take the run folder."""
    max_requeues: NotNegativeInt
    """How many times a job that was stopped with its state saved may be requeued."""
    memory_policy: Literal["refuse", "warn"]
    """What to do at the start where weights, gradients and optimizer are estimated to exceed the GPU's memory."""
    eval_claim_timeout_s: PositiveFloat
    """Seconds without renewal after which another eval worker may take a claim."""


DOMAINS: dict[str, type] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "detection": DetectionConfig,
    "infrastructure": InfrastructureConfig,
}
"""Section name of the v2 form → its dataclass."""

OWNERS: dict[str, str] = {field.name: name for name, cls in DOMAINS.items() for field in fields(cls)}
"""Key → the section that owns it."""

TYPES: dict[str, Any] = {
    key: hint for cls in DOMAINS.values() for key, hint in get_type_hints(cls, include_extras=True).items()
}
"""Key → its type, with its rules and uses."""


RETIRED: dict[str, str] = {
    "gradient_checkpointing_reentrant": "the variant that is not reentrant is always used",
    "tensorboard_flush_secs": "event files are flushed every 10 seconds",
    "logging_first_step": "the first step is always logged",
    "ddp_find_unused_parameters": "every parameter that trains is in the graph of each step",
    "hash_data": "provenance.json always has the hashes of the data files",
    "torch_compile": "the model is never compiled",
}
"""Key of an older version → what takes its place. Recorded configs of old runs may state it."""

VALUES_BEFORE: dict[str, Any] = {
    "exif_frame": "auto",
    "emptied_photo_policy": "negative",
    "lora_rank": 0,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "memory_policy": "warn",
}
"""Key that old runs did not record → the value that describes what they did."""


def keys_used_for(purpose: Purpose) -> tuple[str, ...]:
    """Return the keys that something depends on, in the order of the domains.

    Args:
        purpose: `conversion`: the converted data. `shard`: one shard of them, before the merge; the label rules
            (hierarchy, token map, response types, language) are hashed by content beside these keys. `score`: the
            score of a checkpoint; files that a score reads are hashed by content beside these keys.
    """
    mark = UsedFor(purpose)
    return tuple(key for key, hint in TYPES.items() if mark in get_args(hint)[1:])
