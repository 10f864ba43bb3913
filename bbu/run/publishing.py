"""A checkpoint on its way: written hidden by all ranks, flushed and hashed while training continues, then published.

The main threads write the files and meet at barriers. Everything after that happens in a thread of each rank, so that
no step waits for a disk. These threads use no collective, which would get between those of the training: they post
short texts on a board that all ranks share. So a checkpoint is published even where the main threads have failed. The
error of a rank is posted too: otherwise the others would wait for that rank until they are killed.

1. all ranks write into `.saving-checkpoint-{step}/checkpoint-{step}`; a barrier
2. each rank, in a thread: fsync all files (dirty pages lie on the node that wrote them), hash its own, post the hashes
3. rank 0, in its thread: collect the hashes, write the manifest, rename the folder, fsync its parent, post the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bbu.errors import CheckpointError, error_lines
from bbu.run.checkpoints import (
    CORRUPT,
    MANIFEST,
    SAVING,
    FileEntry,
    Manifest,
    file_sizes,
    hash_files,
    is_published,
)
from bbu.run.files import sync_folder, write_atomic
from bbu.run.folder import RunFolder, checkpoint_name

logger = logging.getLogger(__name__)
_RANK_IN_NAME = re.compile(r"(?:rng_state|rank)_(\d+)")
"""How Trainer and DeepSpeed name the files that each rank writes: rng_state_3.pth, zero_pp_rank_3_mp_rank_00_….pt."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
"""Pauses between two looks at the board; each is half as long again as the one before."""
_PUBLISHED, _FAILED = "published", "failed"
"""What is posted at the end: that the checkpoint is there, or which error keeps it from appearing."""


class Board(Protocol):
    """Texts that every rank may post and read at any time and from any thread."""

    def post(self, key: str, text: str) -> None:
        """Post a text for all ranks."""

    def read(self, key: str) -> str | None:
        """Return the text that a rank has posted, None as long as none has."""


class LocalBoard:
    """The board of one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def post(self, key: str, text: str) -> None:
        """Post a text for all threads."""
        self._texts[key] = text

    def read(self, key: str) -> str | None:
        """Return the text that a thread has posted, None as long as none has."""
        return self._texts.get(key)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; by default it has none."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    """returns once every rank has called it; the main threads alone call it"""
    board: Board = field(default_factory=LocalBoard)


@dataclass(frozen=True)
class Origin:
    """What a manifest says about where a checkpoint comes from."""

    config_hash: str
    image_digest: str | None


def stage_checkpoint(run: RunFolder, step: int, ranks: Ranks) -> Path:
    """Make the hidden folder that all ranks write a step into. Collective.

    It is itself named `checkpoint-{step}`, so that its parent serves a Trainer as output folder. A damaged checkpoint
    in the way is set aside. Raises CheckpointError if the step is published already.
    """
    blocked = is_published(run, step)
    ranks.barrier()  # every rank has looked before rank 0 moves anything
    if blocked:
        raise CheckpointError(f"{run.checkpoint(step)}: published already, and never rewritten; choose another step")
    staged = _staging_folder(run, step)
    if ranks.rank == 0:
        _prepare(run, step, staged)
    ranks.barrier()
    return staged


class PendingCheckpoint:
    """Publishes a staged checkpoint in the background; every rank makes one once all ranks have written their files.

    Args:
        run: the run folder.
        step: the step of the checkpoint.
        ranks: this rank among all.
        origin: what the manifest says besides.
        check_lease: called on rank 0 just before the checkpoint appears; raises CheckpointError to prevent it.
        after: called on rank 0 once the checkpoint is published, in the same thread.
    """

    def __init__(
        self,
        run: RunFolder,
        step: int,
        ranks: Ranks,
        origin: Origin,
        check_lease: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.step = step
        self._run, self._ranks, self._origin = run, ranks, origin
        self._check_lease, self._after = check_lease, after
        self._staged = _staging_folder(run, step)
        self.published_at: float | None = None
        """when the checkpoint appeared, by time.monotonic(); known on rank 0 alone"""
        self._error: BaseException | None = None
        # A daemon, so that a process that ends by a defect does not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run_thread, name="publication", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the checkpoint is published and on disk for all ranks, or cannot be. Does not wait."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return once the checkpoint is published and on disk for all ranks; raises what prevents that on this rank."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run_thread(self) -> None:
        try:
            self._publish()
        except BaseException as error:
            self._error = error
            with contextlib.suppress(Exception):  # where the board is gone, the others notice that
                self._post_failure(error)

    def _publish(self) -> None:
        self._post(str(self._ranks.rank), _dump_entries(self._flush_and_hash()))
        if self._ranks.rank != 0:
            self._await(_PUBLISHED)
            return
        texts = [self._await(str(rank)) for rank in range(self._ranks.world_size)]
        entries = {name: entry for text in texts for name, entry in _load_entries(text).items()}
        _seal(self._staged, Manifest(self.step, self._ranks.world_size, **vars(self._origin), files=entries))
        self._check_lease()
        _move_into_place(self._staged, self._run.checkpoint(self.step))
        self.published_at = time.monotonic()
        self._post(_PUBLISHED, "")
        self._after()

    def _post(self, name: str, text: str) -> None:
        self._ranks.board.post(f"{checkpoint_name(self.step)}/{name}", text)

    def _read(self, name: str) -> str | None:
        return self._ranks.board.read(f"{checkpoint_name(self.step)}/{name}")

    def _await(self, name: str) -> str:
        """Read a text about this step as soon as it is posted; raises CheckpointError once a rank has failed."""
        pause = _SHORTEST_PAUSE_S
        while (text := self._read(name)) is None:
            if (failure := self._read(_FAILED)) is not None:
                raise CheckpointError(f"{self._run.checkpoint(self.step)} is not published: {failure}")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        return text

    def _post_failure(self, error: BaseException) -> None:
        """Post the error of this rank, unless that of another rank is the reason."""
        if self._read(_FAILED) is None:
            lines = error_lines(error) or [f"{type(error).__name__}: {error}"]
            self._post(_FAILED, f"rank {self._ranks.rank}: {lines[0]}")

    def _flush_and_hash(self) -> dict[str, FileEntry]:
        """fsync all files and, meanwhile, hash those of this rank."""
        sizes = file_sizes(self._staged)
        names = [name for name in sizes if _writer_of(name, self._ranks.world_size) == self._ranks.rank]
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(hash_files, self._staged, names)
            _sync_tree(self._staged)
            digests = hashing.result()
        return {name: FileEntry(sizes[name], digests[name]) for name in names}


def _staging_folder(run: RunFolder, step: int) -> Path:
    return run.root / f"{SAVING}{checkpoint_name(step)}" / checkpoint_name(step)


def _writer_of(name: str, world_size: int) -> int:
    """The rank that wrote a file, and hashes it: it has the bytes in its page cache. A wrong guess costs time only."""
    match = _RANK_IN_NAME.search(name)
    return int(match[1]) % world_size if match else 0


def _dump_entries(entries: dict[str, FileEntry]) -> str:
    return json.dumps({name: [entry.size, entry.sha256] for name, entry in entries.items()})


def _load_entries(text: str) -> dict[str, FileEntry]:
    return {name: FileEntry(*values) for name, values in json.loads(text).items()}


def _sync_tree(folder: Path) -> None:
    """fsync every file and folder below and including `folder`."""
    for name in file_sizes(folder):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync_folder(path)


def _prepare(run: RunFolder, step: int, staged: Path) -> None:
    if run.checkpoint(step).exists():
        _set_aside(run.checkpoint(step))
    if staged.parent.exists():
        shutil.rmtree(staged.parent)
    staged.mkdir(parents=True)


def _set_aside(damaged: Path) -> None:
    """Hide a damaged checkpoint from readers without losing it; only the last one of a step is kept."""
    aside = damaged.with_name(CORRUPT + damaged.name)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():  # what has rotted may refuse to go
        aside = Path(tempfile.mkdtemp(prefix=f"{aside.name}-", dir=aside.parent))
    os.rename(damaged, aside)
    logger.warning("%s is damaged and in the way; moved to %s, remove it at will", damaged, aside)


def _seal(staged: Path, manifest: Manifest) -> None:
    """Write the manifest. Files that no rank has hashed are hashed here."""
    sizes = file_sizes(staged)
    if not sizes:
        raise CheckpointError(f"{staged}: nothing was saved for step {manifest.step}; nothing is published")
    unhashed = [name for name in sizes if name not in manifest.files]
    rest = {name: FileEntry(sizes[name], digest) for name, digest in hash_files(staged, unhashed).items()}
    write_atomic(staged / MANIFEST, dataclasses.replace(manifest, files={**manifest.files, **rest}).dumps())


def _move_into_place(staged: Path, final: Path) -> None:
    os.rename(staged, final)  # fails if something that is not empty is there
    shutil.rmtree(staged.parent)
    sync_folder(final.parent)
