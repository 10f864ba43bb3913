"""The five domains of a run config: the single source of every key, its type and its meaning.

Together they have 149 fields. No field has a default: a config states all of them. The string under a
field is its documentation. Derived values are properties; nothing mutates a domain.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Which Qwen2.5-VL, and how it computes."""

    model_path: str
    """Folder of a Qwen2.5-VL model (config, weights, tokenizer, image processor); read offline."""
    model_max_length: int
    """Longest sequence, in tokens; a longer sample is refused by name."""
    attn_implementation: str
    """Attention of the language model: flash_attention_2, varlen, sdpa or eager."""
    vision_attn_implementation: str
    """Attention of the vision tower: flash_attention_2, varlen, sdpa or eager."""
    torch_dtype: str
    """Dtype the weights are loaded in: float32, bfloat16 or float16; below float32 training needs DeepSpeed."""
    tf32: bool
    """Let float32 matrix products use TF32 on GPUs that have it."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass to save memory."""
    gradient_checkpointing_reentrant: bool
    """Use the reentrant variant of gradient checkpointing."""
    logits_chunk_size: int
    """Supervised positions whose logits are computed at once; 0 computes all at once."""
    torch_compile: bool
    """Compile the model with torch.compile."""
    generation_max_new_tokens: int
    """Longest generated answer, in tokens."""
    generation_batch_size: int
    """Images answered at once in inference and evaluation."""
    generation_repetition_penalty: float
    """Repetition penalty of greedy decoding; 1.0 is none."""


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: how long, how fast, how it is weighed and when it is saved."""

    num_train_epochs: float
    """Passes over the training set; ignored where max_steps is positive."""
    max_steps: int
    """Optimizer steps; -1 lets num_train_epochs decide."""
    per_device_train_batch_size: int
    """Samples per rank and micro-batch."""
    per_device_eval_batch_size: int
    """Samples per rank in evaluation loss."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step."""
    vision_lr: float
    """Learning rate of the vision tower; 0 freezes it."""
    merger_lr: float
    """Learning rate of the vision-to-language merger; 0 freezes it."""
    llm_lr: float
    """Learning rate of the language model; 0 freezes it."""
    detection_lr: float
    """Learning rate of the detection head's decoder and branches; 0 freezes them."""
    adapter_lr: float
    """Learning rate of the detection head's input adapters; 0 freezes them."""
    weight_decay: float
    """AdamW weight decay; norms and biases are excluded."""
    optim: str
    """Optimizer by transformers' name, for example adamw_torch_fused."""
    adam_beta1: float
    """First-moment decay of AdamW."""
    adam_beta2: float
    """Second-moment decay of AdamW."""
    adam_epsilon: float
    """Denominator term of AdamW."""
    max_grad_norm: float
    """Global gradient-norm clip; 0 switches clipping off."""
    lr_scheduler_type: str
    """Schedule by transformers' name, for example cosine."""
    warmup_ratio: float
    """Share of the steps spent warming up; used where warmup_steps is 0."""
    warmup_steps: int
    """Steps spent warming up; 0 lets warmup_ratio decide."""
    auto_scale_lr: bool
    """Scale all learning rates by global batch size over lr_reference_batch_size."""
    lr_reference_batch_size: int
    """Global batch size for which the stated learning rates hold."""
    bf16: bool
    """Mixed precision in bfloat16."""
    fp16: bool
    """Mixed precision in float16."""
    seed: int
    """Seed of initialisation and dropout."""
    data_seed: int
    """Seed of data order and teacher draws."""
    teacher_loss_weight: float
    """Weight of the language loss on teachers' answers."""
    student_loss_weight: float
    """Weight of the language loss on students' answers."""
    save_strategy: str
    """When to checkpoint: steps, epoch or no."""
    save_steps: int
    """Optimizer steps between checkpoints under save_strategy steps."""
    save_total_limit: int
    """Checkpoints kept, newest first by step; 0 keeps all."""
    save_final: bool
    """Checkpoint at the end of training whatever the strategy."""
    eval_strategy: str
    """When to compute the validation loss: steps, epoch or no."""
    eval_steps: int
    """Optimizer steps between validation losses under eval_strategy steps."""
    logging_steps: int
    """Optimizer steps between log lines; the length of the averaging window."""
    logging_first_step: bool
    """Log the first step too."""
    log_weight_norms: bool
    """Write wn/<group>, the weight norm of each parameter group."""
    log_grad_norms: bool
    """Write gn/<group>, the gradient norm of each parameter group."""
    resume: str
    """auto continues from the newest checkpoint that verifies; never starts afresh."""
    nan_policy: str
    """On a non-finite loss or gradient: stop, or skip the optimizer step."""
    nan_max_skips: int
    """Skipped steps in a row after which skip turns into stop."""
    eval_iou_threshold: float
    """IoU from which a prediction counts as found in the headline score."""
    eval_bootstrap_samples: int
    """Bootstrap resamples of the validation set for intervals; 0 switches them off."""
    eval_bootstrap_confidence: float
    """Confidence level of the bootstrap intervals."""


@dataclass(frozen=True)
class DataConfig:
    """From vendor files to batches: conversion, conversations, collation, loading."""

    vendor_dir: str
    """Folder of vendor JSON and JPEG pairs, read recursively."""
    data_root: str
    """Folder conversion writes and training reads; record paths are relative to it."""
    train_file: str
    """Training records, relative to data_root."""
    val_file: str
    """Validation records, relative to data_root."""
    teacher_file: str
    """Pool of worked examples, relative to data_root."""
    image_folder: str
    """Folder of resized images, relative to data_root."""
    min_pixels: int
    """Fewest pixels of a resized image."""
    max_pixels: int
    """Most pixels of a resized image."""
    jpeg_quality: int
    """JPEG quality of resized images, 1 to 95."""
    response_types: list[str]
    """Levels of a description, in order: object_type, property, extra_info."""
    token_map_file: str
    """YAML of label renames; a name under configs/labels or a path."""
    label_hierarchy_file: str
    """YAML of allowed object types and properties; a name under configs/labels or a path."""
    unknown_label_policy: str
    """A label outside the hierarchy: drop it with a reason, or refuse the conversion."""
    site_pattern: str
    """Regular expression whose first group, searched in a photo's file stem, names its site."""
    val_ratio: float
    """Share of sites that go to validation."""
    split_seed: int
    """Seed of the split by site."""
    teacher_pool_size: int
    """Worked examples put into the teacher pool."""
    max_reject_share: float
    """Share of rejected photos above which conversion exits with an error."""
    min_visible_ratio: float
    """Share of a box that must lie inside the image; below it the box is dropped."""
    min_box_side: float
    """Shortest side of a box after resizing, in pixels; smaller ones are widened to it."""
    remove_duplicates: bool
    """Drop exact duplicate objects, counted."""
    keep_negatives: bool
    """Keep photos without any object as negatives."""
    convert_processes: int
    """Processes of the conversion pool; 0 uses every core."""
    max_examples: int
    """Training records used; -1 uses all."""
    max_eval_examples: int
    """Validation records used; -1 uses all."""
    teacher_ratio: float
    """Share of training samples that see worked examples first."""
    num_teacher_samples: int
    """Worked examples before a student, where there are any."""
    eval_teacher_ratio: float
    """Share of validation samples that see worked examples first."""
    language: str
    """Language of the prompts: zh or en."""
    train_prompt: str
    """Prompt of training: detailed or concise."""
    eval_prompt: str
    """Prompt of inference and evaluation: detailed or concise."""
    object_order: str
    """Order of objects in an answer: reading (top to bottom, left to right) or source."""
    collator_type: str
    """standard pads a batch; packed concatenates it."""
    max_total_length: int
    """Tokens of one packed sequence."""
    packing_buffer_size: int
    """Samples looked at together when bins are packed."""
    packing_balance_vision_weight: float
    """Cost of a ViT patch relative to an LLM token when ranks are balanced."""
    long_sample_policy: str
    """A sample over model_max_length: refuse the run, or drop it with a report."""
    pad_to_multiple_of: int
    """Padded length is a multiple of this."""
    shuffle: bool
    """Shuffle the training set each epoch."""
    dataloader_num_workers: int
    """Worker processes of a DataLoader; 0 loads in the main process."""
    dataloader_prefetch_factor: int
    """Batches each worker loads ahead."""
    dataloader_pin_memory: bool
    """Page-lock batches for faster copies to a GPU."""
    dataloader_persistent_workers: bool
    """Keep workers between epochs."""
    dataloader_drop_last: bool
    """Drop the last incomplete batch of an epoch."""


@dataclass(frozen=True)
class DetectionConfig:
    """The DETR-style head, its matcher and its losses."""

    detection_enabled: bool
    """Train and use the detection head."""
    detection_num_queries: int
    """Object queries; more than the most objects of a photo."""
    detection_hidden_dim: int
    """Width of the decoder."""
    detection_num_layers: int
    """Decoder layers."""
    detection_num_heads: int
    """Attention heads of a decoder layer."""
    detection_ffn_dim: int
    """Width of a decoder layer's feed-forward block."""
    detection_dropout: float
    """Dropout in the decoder."""
    detection_adapter_dim: int
    """Hidden width of the adapters from the model's states to the decoder."""
    detection_use_language_memory: bool
    """Let queries attend to the prompt's language states beside the image."""
    detection_detach_memory: bool
    """Stop the head's gradient before the model."""
    detection_freeze_epochs: float
    """Epochs during which the head is frozen at the start."""
    detection_caption_layers: int
    """Layers of the caption decoder."""
    detection_caption_max_length: int
    """Longest caption, in tokens."""
    detection_caption_dropout: float
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
    """Weight of the head's whole loss beside the language loss."""
    detection_cost_bbox: float
    """L1 box term of the matching cost."""
    detection_cost_giou: float
    """GIoU term of the matching cost."""
    detection_cost_objectness: float
    """Objectness term of the matching cost."""
    detection_focal_alpha: float
    """Balance of the focal loss."""
    detection_focal_gamma: float
    """Focusing exponent of the focal loss."""
    detection_prior_prob: float
    """Objectness a fresh head predicts; sets the bias."""
    detection_denoising_queries: int
    """Denoising queries per sample (DINO); 0 switches them off."""
    detection_denoising_noise: float
    """Box noise of denoising queries, as a share of box size."""
    detection_score_threshold: float
    """Objectness from which a query is reported at inference."""
    detection_max_predictions: int
    """Most objects reported per image by the head."""


@dataclass(frozen=True)
class InfrastructureConfig:
    """Where a run lives and how its processes behave."""

    run_name: str
    """Name of the run; its folder is output-{run_name}."""
    output_root: str
    """Folder that holds run folders."""
    log_level: str
    """Level of the logs: DEBUG, INFO, WARNING or ERROR."""
    log_verbose: bool
    """Log every component at log_level instead of the training summary only."""
    progress: str
    """Progress display: auto (bar on a terminal, lines elsewhere), bar, lines or off."""
    tensorboard: bool
    """Write TensorBoard event files."""
    tensorboard_flush_secs: int
    """Seconds between flushes of the event files."""
    deepspeed_enabled: bool
    """Train with DeepSpeed; the variable BBU_DEEPSPEED_ENABLED overrides it."""
    deepspeed_config: str
    """DeepSpeed JSON; the variable BBU_DEEPSPEED_CONFIG overrides it."""
    distributed_backend: str
    """Collectives between ranks: auto (nccl with GPUs, else gloo), nccl or gloo."""
    distributed_timeout_s: int
    """Seconds a collective may wait for the slowest rank."""
    ddp_find_unused_parameters: bool
    """Let DDP look for parameters that took no part in a step."""
    cpu_threads: int
    """Threads of torch on CPU; 0 leaves torch's choice."""
    shape_checks: bool
    """Check tensor shapes at module boundaries."""
    status_interval_s: float
    """Seconds between heartbeats in status.json."""
    lease_timeout_s: float
    """Seconds without heartbeat after which another trainer may take a run folder."""
    max_requeues: int
    """Times a preempted job may requeue itself."""
    hash_data: bool
    """Record SHA-256 of the data files in provenance.json."""
    eval_claim_timeout_s: float
    """Seconds after which an eval worker's claim may be taken over."""
