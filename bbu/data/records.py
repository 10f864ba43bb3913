"""The records files of a run, read and checked as training will use them. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.errors import DataError
from bbu.schema import Record, View, check_distinct_photos, read_numbered_records

Numbered = tuple[int, Record]
"""The line of a record in its file, from 1, and the record."""


@dataclass(frozen=True)
class RecordsFile:
    """The records of one file, parsed. Their photos are not looked at before `check_photos`."""

    path: Path
    """The JSONL file."""
    root: Path
    """data_root, which the paths of photos are relative to."""
    numbered: tuple[Numbered, ...]
    """All records of the file."""
    limit: int
    """How many of them are used, from the first on; -1 for all."""
    is_scored: bool
    """Whether scores are computed over its photos, which a photo that is listed twice would count twice."""

    @property
    def used(self) -> tuple[Numbered, ...]:
        """The records that are used."""
        return self.numbered[: self.limit if self.limit >= 0 else None]

    @property
    def records(self) -> list[tuple[str, Record]]:
        """The records that are used, each with the name that messages call it by."""
        name = self.path.name
        return [(f"{name}[{i}] {record.student.images[0]}", record) for i, (_, record) in enumerate(self.used)]

    def views(self) -> Iterator[tuple[str, View]]:
        """The views of the records that are used, each with the name of its record: students, and their teachers."""
        return ((name, view) for name, record in self.records for view in (record.student, *(record.teachers or ())))

    def check_photos(self) -> None:
        """Refuse missing images at start-up, where they would otherwise end the run hours later.

        This looks at every file once: among many ranks, one is enough. Damaged images are not noticed here: to decode
        all of them would take too long.

        Raises:
            DataError: an image is missing, or a photo is listed twice in a file that is scored.
        """
        if self.is_scored:
            check_distinct_photos(self.numbered, self.path, self.root)
        views = [(n, view) for n, record in self.used for view in (record.student, *(record.teachers or ()))]
        images = [(number, image) for number, view in views for image in view.images]
        # os.path, because Path.is_file() raises OSError for a name that is too long.
        missing = [f"{image} (line {number})" for number, image in images if not os.path.isfile(self.root / image)]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} images are missing, for example {', '.join(missing[:3])}; convert again "
                "or correct data_root"
            )


def read_split(config: DataConfig, train: bool) -> RecordsFile:
    """Read the records of training or validation.

    Raises:
        DataError: a line is no record, or there is no record at all.
    """
    root = Path(config.data_root)
    path = root / (config.train_file if train else config.val_file)
    limit = config.max_examples if train else config.max_eval_examples
    # A photo listed twice is trained on twice, which somebody may want.
    file = RecordsFile(path, root, tuple(read_numbered_records(path)), limit, is_scored=not train)
    if not file.used:
        advice = "raise max_examples" if train else "raise max_eval_examples, or set eval_strategy to no"
        raise DataError(f"{path}: no record to {'train' if train else 'validate'} on; convert again or {advice}")
    return file


def read_pool(config: DataConfig) -> RecordsFile:
    """Read the pool of teachers, which are the students of its records. Raises DataError for a damaged record."""
    root = Path(config.data_root)
    path = root / config.teacher_file
    return RecordsFile(path, root, tuple(read_numbered_records(path)), -1, is_scored=False)


def check_records(config: DataConfig, validates: bool) -> None:
    """Read all records that a training would read, and look at their photos, as far as their files are there.

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
                read().check_photos()
        except DataError as error:
            findings.append(str(error))
    if findings:
        raise DataError("\n".join(findings))
