"""The rules of a run config that need more than one key. A rule of a single key stands in its type."""

from __future__ import annotations

from pathlib import Path

from bbu.config.kinds import CrossRule

CROSS_RULES = (
    CrossRule(("bf16", "fp16"), lambda bf16, fp16: bf16 and fp16, "bf16 and fp16 exclude each other; set one to false"),
    CrossRule(
        ("max_steps", "num_train_epochs"),
        lambda steps, epochs: steps <= 0 and epochs <= 0,
        "max_steps and num_train_epochs are both 0 or less; set one of them",
    ),
    CrossRule(
        ("min_pixels", "max_pixels"),
        lambda fewest, most: fewest > most,
        "min_pixels {0} exceeds max_pixels {1}; raise max_pixels or lower min_pixels",
    ),
    CrossRule(
        ("data_root", "vendor_dir"),
        lambda data_root, vendor_dir: Path(data_root).is_relative_to(vendor_dir),
        "data_root lies inside vendor_dir, so converted photos would be read as vendor's; keep them apart",
    ),
    CrossRule(
        ("collator_type", "per_device_train_batch_size"),
        lambda collator, size: collator == "packed" and size != 1,
        "collator_type packed needs per_device_train_batch_size 1: one row is one packed sequence",
    ),
    CrossRule(
        ("collator_type", "max_total_length", "model_max_length"),
        lambda collator, row, sample: collator == "packed" and row < sample,
        "max_total_length {1} is below model_max_length {2}: a sample of that length would not fit into a packed row",
    ),
    CrossRule(
        ("dataloader_persistent_workers", "dataloader_num_workers"),
        lambda persistent, workers: persistent and workers == 0,
        "dataloader_persistent_workers needs dataloader_num_workers above 0",
    ),
    CrossRule(
        ("torch_dtype", "fp16"),
        lambda dtype, fp16: dtype == "float16" and not fp16,
        "torch_dtype float16 needs fp16 true",
    ),
    CrossRule(
        ("detection_hidden_dim", "detection_num_heads"),
        lambda width, heads: width % heads != 0,
        "detection_hidden_dim {0} must be a multiple of detection_num_heads {1}",
    ),
)
