"""The rules of a run config that need more than one key. A rule of a single key stands in its type."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from bbu.config.kinds import CrossRule
from bbu.schema import REJECTS_FILE, REPORT_FILE, SHARD_FOLDER, photos_hash_path

_RECORDS_KEYS = ("train_file", "val_file", "teacher_file")

CROSS_RULES = (
    CrossRule(("bf16", "fp16"), lambda bf16, fp16: bf16 and fp16, "bf16 and fp16 exclude each other; set one to false"),
    CrossRule(
        ("max_steps", "num_train_epochs"),
        lambda steps, epochs: steps <= 0 and epochs <= 0,
        "max_steps and num_train_epochs are both 0 or less; set one of them",
    ),
    CrossRule(
        ("save_strategy", "save_final"),
        lambda strategy, final: strategy == "no" and not final,
        "save_strategy no with save_final false would lose what the run has learnt; set save_final to true",
    ),
    CrossRule(
        ("vision_lr", "merger_lr", "llm_lr", "detection_lr", "adapter_lr", "detection_enabled"),
        lambda *values: not any(values[:3]) and not (values[5] and any(values[3:5])),
        "every learning rate in use is 0, so nothing would train; give a group a rate above 0",
    ),
    CrossRule(
        ("lora_rank", "vision_lr", "merger_lr", "llm_lr"),
        lambda rank, *rates: rank > 0 and not any(rates),
        "lora_rank is {0}, but vision_lr, merger_lr and llm_lr are 0, so no layer would get an adapter; set lora_rank "
        "to 0 or one of the rates above 0",
    ),
    CrossRule(
        ("lora_rank", "torch_dtype", "bf16", "fp16"),
        lambda rank, dtype, bf16, fp16: rank > 0 and {"bfloat16": not bf16, "float16": not fp16}.get(dtype, False),
        "torch_dtype {1} with lora_rank {0} needs mixed precision, because the adapters are float32; set bf16 (or, for "
        "float16, fp16) to true",
    ),
    CrossRule(
        ("teacher_loss_weight", "student_loss_weight", "detection_enabled"),
        lambda teacher, student, head: not (teacher or student or head),
        "teacher_loss_weight and student_loss_weight are both 0 and there is no head, so nothing would be learnt; "
        "raise one of them",
    ),
    CrossRule(
        ("detection_enabled", "detection_freeze_epochs", "num_train_epochs", "max_steps"),
        lambda head, frozen, epochs, steps: head and steps <= 0 < epochs <= frozen,
        "detection_freeze_epochs {1} covers all {2} epochs, so the head would never train; lower it",
    ),
    CrossRule(
        ("min_pixels", "max_pixels"),
        lambda fewest, most: fewest > most,
        "min_pixels {0} exceeds max_pixels {1}; raise max_pixels or lower min_pixels",
    ),
    CrossRule(
        ("data_root", "vendor_dir"),
        lambda data_root, vendor_dir: _is_inside(data_root, vendor_dir),
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


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _leaves_data_root(path: str) -> bool:
    return not path or Path(path).is_absolute() or ".." in Path(path).parts


def _is_no_records_name(path: str) -> bool:
    return not Path(path).parts or Path(path).suffix.lower() in (".jpeg", ".jpg")


def _one_spelling(path: Path | str) -> Path:
    """A path in one of the spellings that some file systems take for one: capitals and accents in one form."""
    return Path(unicodedata.normalize("NFC", os.fspath(path)).casefold())


def _is_reserved(path: str) -> bool:
    first = _one_spelling(path).parts[:1]
    return first in ((REPORT_FILE,), (REJECTS_FILE,), (SHARD_FOLDER,))


def _written_with(records: str) -> set[Path]:
    """A records file and the file of its photos' hash; nothing for what names no file."""
    if not Path(records).name:
        return set()
    return {_one_spelling(records), _one_spelling(photos_hash_path(Path(records)))}


def _collide(first: str, second: str) -> bool:
    one, other = _written_with(first), _written_with(second)
    return any(a.is_relative_to(b) or b.is_relative_to(a) for a in one for b in other)


def _is_under_file(folder: str, records: str) -> bool:
    return any(_one_spelling(folder).is_relative_to(file) for file in _written_with(records))


def _images_meet_vendor(vendor_dir: str, data_root: str, image_folder: str) -> bool:
    images = os.path.join(data_root, image_folder)
    is_named_already = _is_inside(data_root, vendor_dir)
    return not is_named_already and (_is_inside(images, vendor_dir) or _is_inside(vendor_dir, images))


OUTPUT_RULES = (
    *(
        CrossRule((key,), _leaves_data_root, f"{key} {{0!r}} must be a path below data_root, without '..'")
        for key in (*_RECORDS_KEYS, "image_folder")
    ),
    *(
        CrossRule((key,), _is_no_records_name, f"{key} {{0!r}} must name a file, and none that an image could have")
        for key in _RECORDS_KEYS
    ),
    *(
        CrossRule((key,), _is_reserved, f"{key} {{0!r}} is a name of the conversion's own reports; choose another")
        for key in (*_RECORDS_KEYS, "image_folder")
    ),
    *(
        CrossRule(pair, _collide, f"{pair[0]} {{0!r}} and {pair[1]} {{1!r}} would overwrite each other; choose others")
        for pair in (("train_file", "val_file"), ("train_file", "teacher_file"), ("val_file", "teacher_file"))
    ),
    *(
        CrossRule(("image_folder", key), _is_under_file, f"image_folder {{0!r}} is the file that {key} names")
        for key in _RECORDS_KEYS
    ),
    CrossRule(
        ("vendor_dir", "data_root", "image_folder"),
        _images_meet_vendor,
        "vendor_dir {0} and image_folder {2} of data_root {1} lie in each other, so images would overwrite the "
        "vendor's; keep them apart",
    ),
)
"""Rules of what a conversion writes. A recorded config need not follow them: an eval may score the training file."""
