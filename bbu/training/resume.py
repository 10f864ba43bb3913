"""What a resumed run makes of the config keys that have changed since its checkpoint was saved.

`EFFECTS` states the effect of every key in one place. A change is applied, or warned of with its effect, or refused
with the way to make it, or it means nothing to training. Everything is said before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bbu.config.deepspeed import deepspeed_plan
from bbu.config.flat import DirectConfig
from bbu.config.read import load_recorded_config
from bbu.errors import CheckpointError, ConfigError
from bbu.run.checkpoints import Checkpoint
from bbu.run.folder import HEAD_FOLDER, RUN_CONFIG


@dataclass(frozen=True)
class Effect:
    """What happens when a key has changed since the checkpoint was saved."""

    kind: Literal["applied", "warned", "refused", "none"]
    """applied: the present value is in force from the next step on. warned: something else is to be known about it.
    refused: the run does not start. none: training does not read the key."""
    text: str = ""
    """Completes the line `key: old -> new: …`."""
    way: Literal["new run", "start over", "merge", ""] = ""
    """What a person can do instead of a refused change."""


_APPLIED = Effect("applied", "in force from the next step on")
_SCHEDULE = Effect("applied", "the rates follow the new schedule from the next step on")
_SAVING = Effect("applied", "from the next step on")
_VALIDATION = Effect("applied", "validation losses from here on do not compare with those before")
_ORDER = Effect("warned", "what this epoch has left is cut into new batches, so an epoch has another number of steps")
_RECORDS = Effect("warned", "other samples from here on; this epoch continues with those that it has not seen")
_SAMPLES = Effect("warned", "samples are made in another way from here on; the steps so far have seen the old one")
_ELSEWHERE = Effect("warned", "not read: the weights come from the checkpoint; another run_name starts from this model")
_RANDOM = Effect("warned", "not read: the random state comes from the checkpoint")
_NEW_HEAD = Effect("refused", "the head keeps the form that it began with", "start over")
_NEW_RUN = Effect("refused", "the optimizer's state would not fit", "new run")
_NEW_ADAPTERS = Effect("refused", "adapters keep the form that they began with", "merge")
_NONE = Effect("none")

_TABLE: tuple[tuple[Effect, str], ...] = (
    (_APPLIED, "vision_lr merger_lr llm_lr detection_lr adapter_lr weight_decay adam_beta1 adam_beta2 adam_epsilon"),
    (_APPLIED, "max_grad_norm auto_scale_lr lr_reference_batch_size bf16 fp16 teacher_loss_weight student_loss_weight"),
    (_APPLIED, "nan_policy nan_max_skips deepspeed_config tf32 gradient_checkpointing logits_chunk_size"),
    (_APPLIED, "attn_implementation vision_attn_implementation detection_detach_memory detection_freeze_epochs"),
    (_APPLIED, "detection_bbox_weight detection_giou_weight detection_objectness_weight detection_caption_weight"),
    (_APPLIED, "detection_aux_weight detection_loss_weight detection_cost_bbox detection_cost_giou"),
    (_APPLIED, "detection_cost_objectness detection_focal_alpha detection_focal_gamma detection_denoising_queries"),
    (_APPLIED, "detection_denoising_noise lora_dropout"),
    (_SCHEDULE, "num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps"),
    (_SAVING, "save_strategy save_steps save_total_limit save_final eval_strategy eval_steps logging_steps"),
    (_SAVING, "log_weight_norms log_grad_norms tensorboard"),
    (_VALIDATION, "val_file max_eval_examples eval_teacher_ratio eval_prompt"),
    (
        _ORDER,
        "per_device_train_batch_size gradient_accumulation_steps collator_type max_total_length shuffle data_seed",
    ),
    (_ORDER, "packing_buffer_size packing_balance_vision_weight dataloader_drop_last"),
    (_RECORDS, "data_root train_file max_examples long_sample_policy model_max_length"),
    (
        _SAMPLES,
        "teacher_file teacher_ratio num_teacher_samples min_pixels max_pixels language train_prompt object_order",
    ),
    (_ELSEWHERE, "model_path"),
    (_RANDOM, "seed"),
    (
        _NEW_HEAD,
        "detection_num_queries detection_hidden_dim detection_num_layers detection_num_heads detection_ffn_dim",
    ),
    (_NEW_HEAD, "detection_adapter_dim detection_use_language_memory detection_caption_layers detection_dropout"),
    (_NEW_HEAD, "detection_caption_max_length detection_caption_dropout detection_prior_prob"),
    (_NEW_RUN, "detection_enabled optim torch_dtype deepspeed_enabled"),
    (_NEW_ADAPTERS, "lora_rank lora_alpha"),
    # What is computed stays the same: how batches are loaded, padded and checked, how ranks talk.
    (_NONE, "per_device_eval_batch_size pad_to_multiple_of dataloader_num_workers dataloader_prefetch_factor"),
    (_NONE, "dataloader_pin_memory dataloader_persistent_workers distributed_backend distributed_timeout_s"),
    (_NONE, "cpu_threads shape_checks"),
    # Conversion reads these; what it writes is compared with what the checkpoint has seen.
    (_NONE, "vendor_dir image_folder jpeg_quality exif_frame response_types token_map_file label_hierarchy_file"),
    (_NONE, "unknown_label_policy site_pattern val_ratio split_seed teacher_pool_size max_reject_share"),
    (_NONE, "min_visible_ratio min_box_side remove_duplicates keep_negatives emptied_photo_policy convert_processes"),
    # Inference and evals read these.
    (_NONE, "generation_max_new_tokens generation_batch_size generation_repetition_penalty detection_score_threshold"),
    (_NONE, "detection_max_predictions eval_iou_threshold eval_bootstrap_samples eval_bootstrap_confidence"),
    (_NONE, "eval_claim_timeout_s"),
    # Where the run lies and what it reports.
    (_NONE, "run_name output_root resume log_level log_verbose progress status_interval_s lease_timeout_s"),
    (_NONE, "max_requeues memory_policy"),
)
EFFECTS: dict[str, Effect] = {key: effect for effect, keys in _TABLE for key in keys.split()}
"""Key -> the effect of a change, unless the values say more (`_SPECIAL_CASES`) or the key is not in use."""

_WITHOUT_BETAS = ("sgd", "adagrad", "rmsprop", "adafactor")
"""Optimizers that do not read the settings of Adam."""
_HEAD_KEYS = tuple(key for key in EFFECTS if key.startswith("detection_") and key != "detection_enabled")
_IN_USE: tuple[tuple[Callable[[DirectConfig], bool], tuple[str, ...]], ...] = (
    (lambda config: config.max_steps <= 0, ("num_train_epochs",)),
    (lambda config: config.warmup_steps == 0, ("warmup_ratio",)),
    (lambda config: config.auto_scale_lr, ("lr_reference_batch_size",)),
    (lambda config: config.optim not in _WITHOUT_BETAS, ("adam_beta1", "adam_beta2", "adam_epsilon")),
    (lambda config: config.nan_policy == "skip", ("nan_max_skips",)),
    (lambda config: config.save_strategy == "steps", ("save_steps",)),
    (lambda config: config.eval_strategy == "steps", ("eval_steps",)),
    (
        lambda config: config.eval_strategy != "no",
        ("val_file", "max_eval_examples", "eval_teacher_ratio", "eval_prompt"),
    ),
    (
        lambda config: config.collator_type == "packed",
        ("max_total_length", "packing_buffer_size", "packing_balance_vision_weight"),
    ),
    (lambda config: config.collator_type == "standard", ("dataloader_drop_last",)),
    (lambda config: config.teacher_ratio > 0, ("teacher_file", "num_teacher_samples")),
    (lambda config: config.detection_enabled, (*_HEAD_KEYS, "adapter_lr")),
    (lambda config: config.deepspeed_enabled, ("deepspeed_config",)),
    (lambda config: config.lora_rank > 0, ("lora_alpha", "lora_dropout")),
)
"""Keys that matter only where a condition on the config holds."""

_SAME_STATE = {"adamw_torch", "adamw_torch_fused"}
"""Optimizers that read each other's state."""


_PLAIN = "training without DeepSpeed"
_STATE_KINDS = ("DeepSpeed without ZeRO", "ZeRO-1 or ZeRO-2", "ZeRO-1 or ZeRO-2", "ZeRO-3")
"""Who writes an optimizer's state under DeepSpeed, by the stage of ZeRO: each in files of its own."""


@dataclass(frozen=True)
class Change:
    """A key whose value has changed since the checkpoint was saved."""

    key: str
    before: Any
    """The value in the checkpoint's record."""
    after: Any
    """The present value."""
    effect: Effect

    @property
    def moves_samples(self) -> bool:
        """Whether the rest of the epoch holds other samples, or the same ones in other batches."""
        return self.effect in (_ORDER, _RECORDS)

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}: {self.effect.text}"


def review_changes(checkpoint: Checkpoint, config: DirectConfig) -> list[Change]:
    """Compare the present config with the one that a checkpoint was saved under.

    Returns:
        The changes, in the order of the domains.

    Raises:
        ConfigError: changes that a resumed run cannot make, all of them, with the way to make them.
        CheckpointError: the optimizer's state was saved in another way than it would be read.
    """
    recorded = _recorded_config(checkpoint.path, config)
    changes = [
        Change(key, before, after, _effect(key, recorded, config))
        for key, after in config.as_flat().items()
        if (before := getattr(recorded, key)) != after
    ]
    if refused := [change for change in changes if change.effect.kind == "refused"]:
        raise ConfigError(*(f"{change}; {_way(change.effect, checkpoint.path)}" for change in refused))
    _check_state_files(checkpoint, config)
    return changes


def summarise_changes(changes: list[Change]) -> Iterator[tuple[bool, str]]:
    """Say each change in a line, as (whether it is a warning, text); those that mean nothing to training in one."""
    for change in changes:
        if change.effect.kind != "none":
            yield change.effect.kind == "warned", f"changed {change}"
    if silent := [change.key for change in changes if change.effect.kind == "none"]:
        yield False, f"changed without an effect on training: {', '.join(silent)}"


def _recorded_config(checkpoint: Path, config: DirectConfig) -> DirectConfig:
    try:
        return load_recorded_config(checkpoint / RUN_CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: its {RUN_CONFIG} cannot be compared with {config.source} ({error.findings[0]}); "
            + _way(_NEW_RUN, checkpoint)
        ) from error


def _effect(key: str, before: DirectConfig, after: DirectConfig) -> Effect:
    conditions = [condition for condition, keys in _IN_USE if key in keys]
    if any(not condition(before) and not condition(after) for condition in conditions):
        return _NONE
    special = _SPECIAL_CASES.get(key)
    return (special(before, after) if special else None) or EFFECTS[key]


_ADAPTED_RATES = ("vision_lr", "merger_lr", "llm_lr")
"""The rates of the groups that low-rank adapters are for."""


def _rate_effect(key: str) -> Callable[[DirectConfig, DirectConfig], Effect | None]:
    """Refuse a rate that comes from or goes to 0: the optimizer would have other parameters."""

    def effect(before: DirectConfig, after: DirectConfig) -> Effect | None:
        if (getattr(before, key) > 0) == (getattr(after, key) > 0):
            return None
        verb = "unfreezes" if getattr(after, key) > 0 else "freezes"
        way = "merge" if before.lora_rank and key in _ADAPTED_RATES else "new run"
        return Effect("refused", f"this {verb} parameters, and the optimizer's state would not fit", way)

    return effect


def _optimizer_effect(before: DirectConfig, after: DirectConfig) -> Effect | None:
    return _APPLIED if {before.optim, after.optim} <= _SAME_STATE else None


def _rank_effect(before: DirectConfig, after: DirectConfig) -> Effect | None:
    return None if before.lora_rank else _NEW_RUN


def _base_effect(before: DirectConfig, after: DirectConfig) -> Effect | None:
    """Adapters need their base model, which may have moved."""
    if not before.lora_rank:
        return None
    return Effect(
        "warned", "read only where the base model is no longer where the checkpoint says, and must be the same"
    )


def _precision_effect(before: DirectConfig, after: DirectConfig) -> Effect | None:
    """DeepSpeed keeps its state under names and in a form that depend on the precision."""
    return _NEW_RUN if before.deepspeed_enabled and after.deepspeed_enabled else None


_SPECIAL_CASES: Mapping[str, Callable[[DirectConfig, DirectConfig], Effect | None]] = {
    "vision_lr": _rate_effect("vision_lr"),
    "merger_lr": _rate_effect("merger_lr"),
    "llm_lr": _rate_effect("llm_lr"),
    "detection_lr": _rate_effect("detection_lr"),
    "adapter_lr": _rate_effect("adapter_lr"),
    "lora_rank": _rank_effect,
    "model_path": _base_effect,
    "optim": _optimizer_effect,
    "bf16": _precision_effect,
    "fp16": _precision_effect,
}


def _way(effect: Effect, checkpoint: Path) -> str:
    """What to do instead of a change that is refused."""
    model = {
        "merge": f"OUT after `python -m bbu.export --checkpoint {checkpoint} --merge OUT`",
        "start over": f"a copy of {checkpoint} without its {HEAD_FOLDER} folder",
    }.get(effect.way, str(checkpoint))
    return f"change it back, or begin a new run (another run_name) with model_path {model}"


def _check_state_files(checkpoint: Checkpoint, config: DirectConfig) -> None:
    """Refuse an optimizer state that would not be read: plain training and each kind of ZeRO write their own files."""
    saved, present = _saved_state_kind(checkpoint), _present_state_kind(config)
    if saved != present:
        raise CheckpointError(
            f"{checkpoint.path}: the optimizer's state was saved by {saved} and cannot be read by {present}; "
            + _way(_NEW_RUN, checkpoint.path)
        )


def _saved_state_kind(checkpoint: Checkpoint) -> str:
    names = [name.rpartition("/")[2] for name in checkpoint.manifest.files]
    if "optimizer.pt" in names:
        return _PLAIN
    if not any(name.endswith("model_states.pt") for name in names):
        return "nobody"
    if not any(name.endswith("optim_states.pt") for name in names):
        return _STATE_KINDS[0]
    # ZeRO-3 partitions the weights, so each rank writes its own.
    partitioned = any(name.startswith("zero_pp_rank") and name.endswith("model_states.pt") for name in names)
    return _STATE_KINDS[3 if partitioned else 2]


def _present_state_kind(config: DirectConfig) -> str:
    return _STATE_KINDS[deepspeed_plan(config.infrastructure).stage] if config.deepspeed_enabled else _PLAIN
