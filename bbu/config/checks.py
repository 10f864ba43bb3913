"""Rules across fields: what type checks alone cannot refuse. Every finding is told at once."""

from __future__ import annotations

import re
from pathlib import Path

from bbu.config.flat import DirectConfig
from bbu.errors import ConfigError
from bbu.labels import RESPONSE_TYPES

CHOICES: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("flash_attention_2", "varlen", "sdpa", "eager"),
    "vision_attn_implementation": ("flash_attention_2", "varlen", "sdpa", "eager"),
    "torch_dtype": ("float32", "bfloat16", "float16"),
    "save_strategy": ("steps", "epoch", "no"),
    "eval_strategy": ("steps", "epoch", "no"),
    "resume": ("auto", "never"),
    "nan_policy": ("stop", "skip"),
    "unknown_label_policy": ("drop", "refuse"),
    "language": ("zh", "en"),
    "train_prompt": ("detailed", "concise"),
    "eval_prompt": ("detailed", "concise"),
    "object_order": ("reading", "source"),
    "collator_type": ("standard", "packed"),
    "long_sample_policy": ("refuse", "drop"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
    "progress": ("auto", "bar", "lines", "off"),
    "distributed_backend": ("auto", "nccl", "gloo"),
}
SHARES = (
    "warmup_ratio", "adam_beta1", "adam_beta2", "eval_iou_threshold", "eval_bootstrap_confidence", "val_ratio",
    "max_reject_share", "min_visible_ratio", "teacher_ratio", "eval_teacher_ratio", "detection_dropout",
    "detection_caption_dropout", "detection_focal_alpha", "detection_prior_prob", "detection_score_threshold",
)  # fmt: skip
POSITIVE = (
    "model_max_length", "generation_max_new_tokens", "generation_batch_size", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "adam_epsilon", "lr_reference_batch_size",
    "save_steps", "eval_steps", "logging_steps", "min_pixels", "max_pixels", "max_total_length",
    "packing_buffer_size", "pad_to_multiple_of", "detection_num_queries", "detection_hidden_dim",
    "detection_num_layers", "detection_num_heads", "detection_ffn_dim", "detection_adapter_dim",
    "detection_caption_layers", "detection_caption_max_length", "detection_max_predictions",
    "distributed_timeout_s", "status_interval_s", "lease_timeout_s", "eval_claim_timeout_s",
    "tensorboard_flush_secs", "generation_repetition_penalty", "dataloader_prefetch_factor",
)  # fmt: skip
NOT_NEGATIVE = (
    "vision_lr", "merger_lr", "llm_lr", "detection_lr", "adapter_lr", "weight_decay", "max_grad_norm",
    "warmup_steps", "teacher_loss_weight", "student_loss_weight", "save_total_limit", "nan_max_skips",
    "logits_chunk_size", "eval_bootstrap_samples", "teacher_pool_size", "num_teacher_samples", "min_box_side",
    "convert_processes", "dataloader_num_workers", "detection_freeze_epochs", "detection_denoising_queries",
    "cpu_threads", "max_requeues",
)  # fmt: skip
EVAL_IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def check_config(config: DirectConfig) -> None:
    """Raise ConfigError with all findings, each naming the file, the keys and what would be accepted."""
    findings = [*_value_findings(config), *_cross_findings(config)]
    if findings:
        raise ConfigError(*(f"{config.source}: {finding}" for finding in findings))


def _value_findings(config: DirectConfig) -> list[str]:
    values = config.as_flat()
    findings = [
        f"key {key!r} must be one of {', '.join(valid)}, not {values[key]!r}"
        for key, valid in CHOICES.items()
        if values[key] not in valid
    ]
    findings += [f"key {k!r} must be within 0..1, not {values[k]}" for k in SHARES if not 0 <= values[k] <= 1]
    findings += [f"key {k!r} must be above 0, not {values[k]}" for k in POSITIVE if values[k] <= 0]
    return findings + [f"key {k!r} must not be negative, not {values[k]}" for k in NOT_NEGATIVE if values[k] < 0]


def _cross_findings(config: DirectConfig) -> list[str]:
    return [text for broken, text in _rules(config) if broken]


def _rules(c: DirectConfig) -> list[tuple[bool, str]]:
    model, train, data, infra = c.model, c.training, c.data, c.infrastructure
    return [
        (train.bf16 and train.fp16, "bf16 and fp16 exclude each other; set one to false"),
        (train.max_steps <= 0 and train.num_train_epochs <= 0, "max_steps and num_train_epochs are both 0 or less"),
        (data.min_pixels > data.max_pixels, "min_pixels exceeds max_pixels"),
        (not 1 <= data.jpeg_quality <= 95, "jpeg_quality must be within 1..95"),
        (Path(data.data_root).is_relative_to(data.vendor_dir),
         "data_root lies inside vendor_dir, so converted photos would be read as vendor's; keep them apart"),
        (not data.response_types or any(t not in RESPONSE_TYPES for t in data.response_types),
         f"response_types must list some of {', '.join(RESPONSE_TYPES)}"),
        (_capture_groups(data.site_pattern) < 1, "site_pattern must be a regular expression with one group"),
        (round(train.eval_iou_threshold, 4) not in EVAL_IOUS,
         "eval_iou_threshold must be one of 0.5, 0.55, … 0.95, COCO's thresholds"),
        (data.min_pixels < 28 * 28, "min_pixels is below one 28x28 token"),
        (data.collator_type == "packed" and train.per_device_train_batch_size != 1,
         "collator_type packed needs per_device_train_batch_size 1: one row is one packed sequence"),
        (data.collator_type == "packed" and data.max_total_length < model.model_max_length,
         "max_total_length is below model_max_length: a sample that is let in would not fit into a packed row"),
        (data.dataloader_persistent_workers and data.dataloader_num_workers == 0,
         "dataloader_persistent_workers needs dataloader_num_workers above 0"),
        (model.torch_dtype == "float16" and not train.fp16, "torch_dtype float16 needs fp16 true"),
        (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", infra.run_name),
         "run_name may hold letters, digits, '.', '_' and '-' only"),
        (c.detection.detection_hidden_dim % c.detection.detection_num_heads != 0,
         "detection_hidden_dim must be a multiple of detection_num_heads"),
    ]  # fmt: skip


def _capture_groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0
