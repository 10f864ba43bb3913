"""Checkpoints that are whole or not there: a manifest vouches for every byte. `bbu.run.publishing` makes them.

Torch-free: what lies inside a checkpoint is the trainer's affair, that it is complete is ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder, checkpoint_name
from bbu.strict_json import JsonError, build_dataclass, read_json

MANIFEST = "MANIFEST.json"
SAVING, DELETING, CORRUPT = ".saving-", ".deleting-", ".corrupt-"
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|rng_state|scaler|training_args|trainer_state|data_position|latest$|zero_to_fp32|"
    r"global_step\d+/|pytorch_model_fsdp)"
)
"""How the names of files begin that only a resumed training reads; the optimizer's are most of a checkpoint's bytes."""
_HASH_THREADS = 8  # hashlib releases the GIL; one thread reads at about 1 to 2 GB/s
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be: size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record that makes a checkpoint: written last. `files` is keyed by path inside the folder."""

    step: int
    world_size: int
    config_hash: str
    image_digest: str | None
    files: Mapping[str, FileEntry]

    def dumps(self) -> str:
        """Return the JSON text, with a checksum of itself, since no other file vouches for this one."""
        body = asdict(self)
        # No newline at the end: a file that loses its last byte must be found damaged.
        return json.dumps(body | {"sha256": _digest_of(body)}, indent=1, sort_keys=True)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest; raises CheckpointError if it is missing or damaged."""
        try:
            body = read_json(folder / MANIFEST, CheckpointError, "use another checkpoint")
            if body.pop("sha256", None) != _digest_of(body):
                raise JsonError("its checksum differs")
            return build_dataclass(cls, body)
        except OSError as error:
            raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error.strerror}); not a checkpoint") from error
        except JsonError as error:
            raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error}); use another checkpoint") from error


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint that verified."""

    path: Path
    manifest: Manifest


def config_hash(flat: Mapping[str, Any]) -> str:
    """SHA-256 of a flat config, whatever the order of its keys."""
    return _digest_of(flat)


def is_published(run: RunFolder, step: int) -> bool:
    """Whether `checkpoint-{step}` is there and verifies."""
    return _passes(verify, run.checkpoint(step))


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, and that there is none besides.

    Reads every byte. Raises CheckpointError with the first thing that is wrong, an unreadable file included.
    """
    manifest = verify_sizes(folder)
    _check_bytes(folder, manifest.files)
    return manifest


def verify_model(folder: Path) -> None:
    """Check a checkpoint before its model is used: names and sizes of all files, and all bytes but the optimizer's.

    The folder may have another name, as a copy that is kept or handed on does. Raises CheckpointError.
    """
    manifest = Manifest.load(folder)
    _check_sizes(folder, manifest)
    _check_bytes(folder, {name: entry for name, entry in manifest.files.items() if is_model_file(name)})


def is_model_file(name: str) -> bool:
    """Whether a file of a checkpoint belongs to its model, not to the state of its training or to the checkpoint."""
    return name != MANIFEST and not _TRAINING_STATE.match(name)


def verify_sizes(folder: Path) -> Manifest:
    """Check a checkpoint's manifest, file names and sizes, without reading its files. Raises CheckpointError."""
    manifest = Manifest.load(folder)
    if folder.name != checkpoint_name(manifest.step):
        raise CheckpointError(f"{folder}: its manifest says step {manifest.step}; the folder was renamed or mixed up")
    _check_sizes(folder, manifest)
    return manifest


def newest(run: RunFolder) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies, None where there are none; warns of each it passes over.

    With several ranks call it on one and broadcast: it reads every byte. Raises CheckpointError if there are
    checkpoints but none verifies, for starting over would silently lose them.
    """
    steps = run.steps()
    for step in reversed(steps):
        try:
            return Checkpoint(run.checkpoint(step), verify(run.checkpoint(step)))
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    if steps:
        raise CheckpointError(f"{run.root}: none of {len(steps)} checkpoints verifies; move them away to start over")
    return None


def rotate(run: RunFolder, keep: int, held: Collection[int] = ()) -> list[int]:
    """Delete what is older, by step, than the newest `keep` sound checkpoints; `held` steps stay. Rank 0 only.

    `keep` 0 keeps all. Damaged checkpoints do not count as kept, so they never push out a good one. One that cannot be
    deleted stays, with a warning. Returns the deleted steps.
    """
    sound = [step for step in run.steps() if _passes(verify_sizes, run.checkpoint(step))]
    if keep == 0 or len(sound) <= keep:
        return []
    doomed = [step for step in run.steps() if step < sound[-keep] and step not in held]
    return [step for step in doomed if _is_deleted(run.checkpoint(step))]


def clean_leftovers(run: RunFolder) -> list[Path]:
    """Remove what crashed saves and deletions left. Rank 0 only, at start-up, by the holder of the lease."""
    leftovers = [path for prefix in (SAVING, DELETING) for path in sorted(run.root.glob(f"{prefix}*"))]
    for path in leftovers:
        logger.warning("removing the leftover of an interrupted save or deletion: %s", path)
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); remove it at will", path, error.strerror)
    return leftovers


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    try:
        sizes = file_sizes(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); use another checkpoint") from error
    for name in sorted(sizes.keys() ^ manifest.files.keys()):
        kind = "is missing" if name in manifest.files else "is not in the manifest"
        raise CheckpointError(f"{folder}: {name} {kind}; use another checkpoint")
    for name, entry in manifest.files.items():
        if sizes[name] != entry.size:
            raise CheckpointError(f"{folder}: {name} has {sizes[name]} bytes instead of {entry.size}; use another one")


def _check_bytes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    try:
        digests = hash_files(folder, files)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); use another checkpoint") from error
    for name, entry in files.items():
        if digests[name] != entry.sha256:
            raise CheckpointError(f"{folder}: {name} has changed since it was saved; use another checkpoint")


def _is_deleted(folder: Path) -> bool:
    """Delete a checkpoint; False, with a warning, where it is still there: an old one never ends a training.

    First out of sight, in one step, so that no reader meets half a checkpoint.
    """
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s); remove it at will", folder, error.strerror)
    return not folder.exists()


def _passes(check: Callable[[Path], Manifest], folder: Path) -> bool:
    """Whether a checkpoint passes `verify` or `verify_sizes`."""
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a checkpoint but its manifest, by relative path."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: not a plain file; a checkpoint must hold its own bytes")
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    sizes.pop(MANIFEST, None)
    return sizes


def hash_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """SHA-256 in hex of each file of a folder, by name."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(folder / name), names), strict=True))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
