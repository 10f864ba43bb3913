"""The records files of a run, read and checked as training will use them. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.errors import DataError
from bbu.schema import Record, View, read_distinct_records, read_numbered_records

Numbered = tuple[int, Record]
"""The line of a record in its file, from 1, and the record."""


def read_split(config: DataConfig, train: bool) -> list[Numbered]:
    """Read the records of training or validation, as many as the config uses.

    Raises:
        DataError: a line is no record, an image is missing, there is no record at all, or the validation file lists a
            photo twice.
    """
    root = Path(config.data_root)
    path = root / (config.train_file if train else config.val_file)
    limit = config.max_examples if train else config.max_eval_examples
    # A photo listed twice is trained on twice, which somebody may want; scores over it would count it twice.
    numbered = read_numbered_records(path) if train else read_distinct_records(path, root)
    records = list(islice(numbered, limit if limit >= 0 else None))
    if not records:
        advice = "raise max_examples" if train else "raise max_eval_examples, or set eval_strategy to no"
        raise DataError(f"{path}: no record to {'train' if train else 'validate'} on; convert again or {advice}")
    _check_images(root, path, records)
    return records


def read_pool(config: DataConfig) -> list[View]:
    """Read the pool of teachers. Raises DataError for a damaged record and for a missing image."""
    root = Path(config.data_root)
    path = root / config.teacher_file
    records = list(read_numbered_records(path))
    _check_images(root, path, records)
    return [record.student for _, record in records]


def check_records(config: DataConfig, validates: bool) -> None:
    """Read all records that a training would read, as far as their files are there.

    Args:
        config: which files, and how many of their records are used.
        validates: whether the training computes a validation loss.

    Raises:
        DataError: all findings, a line each.
    """
    root, findings = Path(config.data_root), []
    draws = config.num_teacher_samples > 0 and max(config.teacher_ratio, config.eval_teacher_ratio) > 0
    for name, is_read, read in (
        (config.train_file, True, lambda: read_split(config, train=True)),
        (config.val_file, validates, lambda: read_split(config, train=False)),
        (config.teacher_file, draws, lambda: read_pool(config)),
    ):
        try:
            if is_read and (root / name).exists():
                read()
        except DataError as error:
            findings.append(str(error))
    if findings:
        raise DataError("\n".join(findings))


def _check_images(root: Path, path: Path, records: Sequence[Numbered]) -> None:
    """Refuse missing images at start-up, where they would otherwise end the run hours later.

    Damaged images are not noticed here: to decode all of them would take too long.
    """
    views = [(n, view) for n, record in records for view in (record.student, *(record.teachers or ()))]
    images = [(number, image) for number, view in views for image in view.images]
    # os.path, because Path.is_file() raises OSError for a name that is too long.
    missing = [f"{image} (line {number})" for number, image in images if not os.path.isfile(root / image)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} images are missing, for example {', '.join(missing[:3])}; convert again or "
            "correct data_root"
        )
