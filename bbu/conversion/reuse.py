"""Converts photos, each unless it was converted before from the same files, by the same rules, and is still there."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.conversion.contents import (
    MACHINE_ERRORS,
    FileFacts,
    HashBudget,
    confirm_facts,
    observe_file,
    read_file,
    write_file,
)
from bbu.conversion.labels import LabelRules
from bbu.conversion.listing import PhotoFiles
from bbu.conversion.names import OUTPUT_SUFFIX, printable_path
from bbu.conversion.photo import PhotoOutcome, convert_photo, outcome_to_dict, parse_outcome
from bbu.conversion.rejects import Reject, Unusable
from bbu.conversion.vendor import read_photo
from bbu.conversion.vendor_json import MAX_JSON_BYTES
from bbu.errors import DataError
from bbu.schema import PHOTOS_HASH_SUFFIX, photos_hash_path

_MAX_JPEG_BYTES = 256 * 2**20
"""Far above the file of any camera; it keeps a wrong file from filling the memory."""
_MISSING, _UNREADABLE, _FAILED = "missing_file", "unreadable_file", "failed"
"""Reasons; another attempt may not meet the last two again although the files are the same."""
_PHOTOS_AHEAD = 4
"""Photos that wait for each process: enough to keep it busy, and few to look through when a process dies."""
_LONGEST_DETAIL = 500
"""Characters of a reject's detail."""


@dataclass(frozen=True)
class PhotoResult:
    """What became of a photo, and of which files."""

    files: PhotoFiles
    """The photo's files, as they were listed."""
    sources: Mapping[str, FileFacts]
    """Path below the vendor folder → facts, of those files that the outcome depends on."""
    written: FileFacts | None
    """The written photo's file; None where none was written."""
    outcome: PhotoOutcome
    """What became of it."""


def confirm_result(
    result: PhotoResult, files: PhotoFiles, config: DataConfig, budget: HashBudget | None = None
) -> PhotoResult | None:
    """Say whether an earlier result still holds.

    Args:
        result: of an earlier conversion with the same settings and label rules.
        files: the photo's files now.
        config: where they lie.
        budget: how much may be read to find out; without one, everything.

    Returns:
        The result, with the facts of now; None where the photo has to be converted again.
    """
    if result.files != files:
        return None
    folder = Path(config.vendor_dir)
    sources = {path: confirm_facts(folder / path, facts, budget) for path, facts in result.sources.items()}
    written = result.written and confirm_facts(_output_path(files, config), result.written, budget)
    if written is None and result.written is not None:
        return None
    current = {path: facts for path, facts in sources.items() if facts is not None}
    return replace(result, sources=current, written=written) if len(current) == len(sources) else None


def is_worth_another_try(result: PhotoResult) -> bool:
    """Whether a photo was rejected for a reason that may have gone although its files are the same."""
    return any(reject.reason in (_UNREADABLE, _FAILED) for reject in result.outcome.rejects if reject.index is None)


def convert_photos(photos: Sequence[PhotoFiles], config: DataConfig, rules: LabelRules) -> list[PhotoResult]:
    """Convert photos, in as many processes as the config says; the results come in the same order.

    Raises:
        OSError: a photo cannot be written, or this machine is in trouble.
        DataError: the vendor's folder has gone.
    """
    convert = partial(_convert_files, config=config, rules=rules)
    processes = min(config.convert_processes or os.cpu_count() or 1, len(photos))
    if processes <= 1:
        return [convert(files) for files in photos]
    results: dict[str, PhotoResult] = {}
    while left := [files for files in photos if files.name not in results]:
        finished, suspects = _convert_in_pool(left, convert, processes)
        results |= finished
        results |= {files.name: _convert_alone(files, convert, config) for files in suspects}
    return [results[files.name] for files in photos]


def _convert_in_pool(
    photos: Sequence[PhotoFiles], convert: partial[PhotoResult], processes: int
) -> tuple[dict[str, PhotoResult], list[PhotoFiles]]:
    """Convert photos until a process dies.

    Returns:
        Name → result of the photos that are converted; the photos that were being converted when a process died.
    """
    results: dict[str, PhotoResult] = {}
    running: dict[Future[PhotoResult], PhotoFiles] = {}
    left = iter(photos)
    pool = _start_pool(processes)
    try:
        while True:
            for files in islice(left, processes * _PHOTOS_AHEAD - len(running)):
                running[pool.submit(convert, files)] = files
            if not running:
                return results, []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running[future].name] = future.result()
                del running[future]
    except BrokenProcessPool:
        return results, list(running.values())
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool(processes: int) -> ProcessPoolExecutor:
    """Start processes as forks, which begin at once; a fork of a process that has used libvips would hang in it."""
    method = "forkserver" if "pyvips" in sys.modules else "fork"
    return ProcessPoolExecutor(processes, multiprocessing.get_context(method))


def _convert_alone(files: PhotoFiles, convert: partial[PhotoResult], config: DataConfig) -> PhotoResult:
    """Convert a photo in a process of its own, so that it can take no other one with it."""
    with _start_pool(1) as pool:
        try:
            return pool.submit(convert, files).result()
        except BrokenProcessPool:
            sources = _Sources(Path(config.vendor_dir))
            for path in (*files.records, *files.images):
                sources.observe(path)
            detail = "the process that converted it was killed, for want of memory or by a crash"
            return _rejected(files, sources, _FAILED, detail)


class _Sources:
    """The vendor's files of one photo, and what they were when they were read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, FileFacts] = {}
        """Path below the folder → facts."""

    def observe(self, path: str) -> None:
        self.facts[path] = observe_file(self.folder / path)

    def read(self, path: str, limit: int) -> bytes:
        """Read a file of at most `limit` bytes. Raises as `read_file`."""
        self.observe(path)
        data, self.facts[path] = read_file(self.folder / path, limit)
        return data


def _convert_files(files: PhotoFiles, config: DataConfig, rules: LabelRules) -> PhotoResult:
    """Convert one photo and write it. A photo that cannot be used, for whatever reason, comes back with that reason."""
    sources = _Sources(Path(config.vendor_dir))
    try:
        outcome, jpeg = _convert_contents(files, sources, config, rules)
    except Unusable as unusable:
        return _rejected(files, sources, unusable.reason, unusable.detail)
    except Exception as error:  # whatever one photo raises is that photo's, and the others are converted
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        return _rejected(files, sources, _FAILED, f"{type(error).__name__}: {error}")
    return PhotoResult(files, sources.facts, _write_photo(_output_path(files, config), jpeg, config), outcome)


def _convert_contents(
    files: PhotoFiles, sources: _Sources, config: DataConfig, rules: LabelRules
) -> tuple[PhotoOutcome, bytes]:
    record = sources.read(_only(files.records, "json", "the image has no JSON beside it"), MAX_JSON_BYTES)
    photo = read_photo(files.name, record)
    others = f", but {', '.join(files.others)}" if files.others else ""
    missing = f"no {files.name}.jpeg or .jpg beside the JSON{others}"
    jpeg = sources.read(_only(files.images, "image", missing), _MAX_JPEG_BYTES)
    image = f"{config.image_folder}/{files.output}{OUTPUT_SUFFIX}"
    outcome, resized = convert_photo(photo, jpeg, image, config, rules)
    parse_outcome(outcome_to_dict(outcome))  # what the schema refuses is this photo's error, not one of the merge
    return outcome, resized


def _only(paths: Sequence[str], what: str, missing: str) -> str:
    """The one path of some. Raises Unusable where there is none or more than one."""
    if not paths:
        raise Unusable(f"missing_{what}", missing)
    if len(paths) > 1:
        raise Unusable(f"ambiguous_{what}", f"{' and '.join(map(printable_path, paths))} are there; keep one of them")
    return paths[0]


def _rejected(files: PhotoFiles, sources: _Sources, reason: str, detail: str) -> PhotoResult:
    if reason in (_MISSING, _UNREADABLE) and not sources.folder.is_dir():
        raise DataError(f"vendor_dir {sources.folder} has gone; mount it again and repeat the command")
    text = detail.encode("utf-8", "backslashreplace").decode()[:_LONGEST_DETAIL]  # a message may quote a file's name
    return PhotoResult(files, sources.facts, None, PhotoOutcome(files.name, None, (Reject(files.name, reason, text),)))


def _output_path(files: PhotoFiles, config: DataConfig) -> Path:
    return Path(config.data_root) / config.image_folder / f"{files.output}{OUTPUT_SUFFIX}"


def _write_photo(path: Path, jpeg: bytes, config: DataConfig) -> FileFacts:
    """Write a photo unless its file holds just that.

    The hashes over the photos of an earlier conversion, which do not cover it, go before.
    """
    try:
        present, facts = read_file(path, len(jpeg))
        if present == jpeg:
            return facts
    except Unusable:
        pass
    withdraw_hashes(config, of_all=True)
    write_file(path, jpeg)
    return replace(observe_file(path), sha256=hashlib.sha256(jpeg).hexdigest())


def withdraw_hashes(config: DataConfig, *, of_all: bool = False) -> None:
    """Remove the hashes over the photos of the config's records files: they say what the photos are, which changes.

    Args:
        config: names the records files.
        of_all: those of other records files beside them too, which may list the same photos.
    """
    names = (config.train_file, config.val_file, config.teacher_file)
    paths = {photos_hash_path(Path(config.data_root) / name) for name in names}
    if of_all:
        folders = {Path(config.data_root), *(path.parent for path in paths)}
        paths |= {path for folder in folders for path in folder.glob(f"*{PHOTOS_HASH_SUFFIX}")}
    for path in paths:
        path.unlink(missing_ok=True)
