"""Keeps beside a records file how many tokens its records have, so that a run need not count them at every start."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.data.packing import SampleCost
from bbu.data.records import RecordsFile
from bbu.errors import DataError
from bbu.run.files import write_atomic
from bbu.run.provenance import file_hash
from bbu.schema import View
from bbu.strict_json import JsonError, build_dataclass, read_json

logger = logging.getLogger(__name__)
OnRank0 = Callable[[Callable[[], Any]], Any]
"""Has rank 0 call a function, and returns its result on all ranks, or raises its error."""
_SUFFIX = ".token_counts.json"
"""Of the file beside a records file: `train.jsonl` -> `train.token_counts.json`."""
_FEWEST = 2000
"""Views that are worth a file; fewer are counted in a second or two."""


def compute_here(compute: Callable[[], Any]) -> Any:
    """Call a function: the OnRank0 of a process without other ranks."""
    return compute()


@dataclass(frozen=True)
class _Counts:
    """The content of the file."""

    key: str
    """SHA-256 over all that the counts depend on."""
    tokens: tuple[int, ...]
    """Of each view, in the order of the records."""
    patches: tuple[int, ...]
    """Of each view, in the order of the records."""


def costs_of_file(
    file: RecordsFile,
    measure: Callable[[Sequence[tuple[str, View]]], list[SampleCost]],
    fingerprint: Callable[[], str],
) -> list[SampleCost]:
    """The cost of each view of a records file: as an earlier start has counted it, or counted now and kept.

    Several runs may do this at once: a reader sees the counts of one of them, whole. Nothing is kept where the folder
    cannot be written, where there are few views, or where the size of a photo is not recorded, because that photo may
    change without its record.

    Args:
        file: the records.
        measure: measures named views.
        fingerprint: says all that a cost depends on beside the view. Called only where counts are kept.
    """
    named = list(file.views())
    if len(named) < _FEWEST or any(view.width is None or len(view.images) > 1 for _, view in named):
        return measure(named)
    path = file.path.with_suffix(_SUFFIX)
    key = hashlib.sha256(f"{file_hash(file.path)} {file.limit} {fingerprint()}".encode()).hexdigest()
    counts = _read_counts(path)
    if counts is not None and counts.key == key and len(counts.tokens) == len(counts.patches) == len(named):
        return [SampleCost(*pair) for pair in zip(counts.tokens, counts.patches, strict=True)]
    costs = measure(named)
    _keep_counts(path, _Counts(key, tuple(c.tokens for c in costs), tuple(c.patches for c in costs)))
    return costs


def _read_counts(path: Path) -> _Counts | None:
    """What an earlier start has kept; None where that is nothing, or damaged."""
    try:
        return (
            build_dataclass(_Counts, read_json(path, DataError, "it will be written anew")) if path.exists() else None
        )
    except (DataError, JsonError, OSError):
        return None


def _keep_counts(path: Path, counts: _Counts) -> None:
    try:
        write_atomic(path, json.dumps(asdict(counts)) + "\n")
    except OSError as error:  # a read-only data_root, or a full disk: the next start counts again
        logger.info("%s is not written (%s): the next start counts tokens again", path, error.strerror or error)
