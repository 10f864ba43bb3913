"""How a checkpoint is published: in the background, whole or not at all, by all ranks or by none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run.checkpoints import MANIFEST, clean_leftovers, hash_files, newest, verify
from bbu.run.folder import RunFolder
from bbu.run.publishing import LocalBoard, PendingCheckpoint, Ranks, stage_checkpoint
from tests.checkpoints import ALONE, NOWHERE, hidden, publishing, save
from tests.commands import ROOT
from tests.run.save_until_killed import kill_again_and_again


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until the event is set, fsync waits."""
    is_done, fsync = threading.Event(), os.fsync

    def wait(descriptor: int) -> None:
        assert is_done.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    return is_done


def write_files(run: RunFolder, step: int, ranks: Ranks = ALONE) -> None:
    """Write a step up to the point where its publication begins."""
    folder = stage_checkpoint(run, step, ranks)
    (folder / "model.safetensors").write_bytes(bytes(5000))
    ranks.barrier()


def test_a_published_step_is_never_rewritten(run: RunFolder):
    before = {p: p.read_bytes() for p in save(run, 10).rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="never rewritten"):
        save(run, 10)
    assert {p: p.read_bytes() for p in run.checkpoint(10).rglob("*") if p.is_file()} == before


def test_an_error_while_saving_publishes_nothing_and_the_next_try_starts_clean(run: RunFolder):
    with pytest.raises(OSError, match="disk full"), publishing(run, 10) as folder:
        (folder / "stray.pt").write_bytes(b"half")
        raise OSError("disk full")
    assert newest(run) is None
    assert "stray.pt" not in verify(save(run, 10)).files


def test_a_save_of_nothing_is_refused(run: RunFolder):
    with pytest.raises(CheckpointError, match="nothing was saved"), publishing(run, 10):
        pass
    assert newest(run) is None


def test_all_ranks_write_one_checkpoint_and_leave_only_when_it_is_published(run: RunFolder):
    barrier, board = threading.Barrier(4, timeout=30), LocalBoard()

    def one(rank: int) -> bool:
        return (save(run, 10, Ranks(rank, 4, lambda: (barrier.wait(), None)[1], board)) / MANIFEST).exists()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [True] * 4
    manifest = verify(run.checkpoint(10))
    assert manifest.world_size == 4
    assert {f"rng_state_{rank}.pth" for rank in range(4)} <= manifest.files.keys()


@pytest.mark.parametrize("stage", ["writing", "_sync_tree", "_seal", "write_atomic", "_move_into_place"])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_former_checkpoint(run: RunFolder, stage: str):
    save(run, 10)
    argv = [sys.executable, "-m", "tests.run.killed_save", str(run.root), stage]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "here\n"
        saver.kill()
    assert run.steps() == [10]
    found = newest(run)
    assert found is not None
    assert found.manifest.step == 10
    assert [path.name for path in clean_leftovers(run)] == [".saving-checkpoint-20"]
    assert hidden(run) == []
    verify(save(run, 20))


def test_what_is_published_verifies_whenever_the_ranks_are_killed(run: RunFolder):
    kill_again_and_again(run, kills=5)
    save(run, 1_000_000)


def test_nobody_waits_for_the_disk_and_no_reader_sees_a_checkpoint_before_it_is_there(
    run: RunFolder, slow_disk: threading.Event
):
    write_files(run, 10)
    pending = PendingCheckpoint(run, 10, ALONE, NOWHERE)
    assert not pending.is_over and run.steps() == [] and newest(run) is None
    slow_disk.set()
    pending.wait()
    assert pending.is_over and verify(run.checkpoint(10)).step == 10


def test_what_fails_in_the_background_is_raised_to_who_waits_and_publishes_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_files(run, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        pending = PendingCheckpoint(run, 10, ALONE, NOWHERE)
        with pytest.raises(OSError, match="No space left"):
            pending.wait()
    assert pending.is_over and newest(run) is None
    verify(save(run, 10))


def test_a_lease_lost_meanwhile_keeps_the_checkpoint_from_appearing(run: RunFolder):
    def refuse() -> None:
        raise CheckpointError("another trainer took over this run")

    write_files(run, 10)
    with pytest.raises(CheckpointError, match="another trainer"):
        PendingCheckpoint(run, 10, ALONE, NOWHERE, check_lease=refuse).wait()
    assert run.steps() == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_keeps_the_checkpoint_of_all_from_appearing_and_says_why(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, failing: int
):
    def refuse(folder: Path, names: Collection[str]) -> dict[str, str]:
        if f"rng_state_{failing}.pth" in names:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return hash_files(folder, names)

    monkeypatch.setattr("bbu.run.publishing.hash_files", refuse)
    board = LocalBoard()
    folder = stage_checkpoint(run, 10, Ranks(0, 2))
    for rank in (0, 1):
        (folder / f"rng_state_{rank}.pth").write_bytes(bytes(20))
    pending = [PendingCheckpoint(run, 10, Ranks(rank, 2, board=board), NOWHERE) for rank in (0, 1)]
    with pytest.raises(CheckpointError, match=f"checkpoint-10 is not published: rank {failing}: .*no space left"):
        pending[1 - failing].wait()
    with pytest.raises(OSError, match="No space left"):
        pending[failing].wait()
    assert run.steps() == []


def test_a_rank_that_is_gone_keeps_the_checkpoint_of_all_from_appearing(run: RunFolder):
    """The others wait until the launcher ends them, as in a collective."""
    board = LocalBoard()
    write_files(run, 10, Ranks(0, 2, board=board))
    pending = PendingCheckpoint(run, 10, Ranks(0, 2, board=board), NOWHERE)
    pending._thread.join(0.2)
    assert not pending.is_over and run.steps() == []
    board.post("checkpoint-10/1", "{}")
    pending.wait()
    assert run.steps() == [10]


def test_each_rank_hashes_the_files_that_are_named_after_it(run: RunFolder):
    board = LocalBoard()
    folder = stage_checkpoint(run, 10, Ranks(0, 2))
    for rank in (0, 1):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bytes(10))
        (folder / f"rng_state_{rank}.pth").write_bytes(bytes(20))
    (folder / "model.safetensors").write_bytes(bytes(30))
    pending = [PendingCheckpoint(run, 10, Ranks(rank, 2, board=board), NOWHERE) for rank in (0, 1)]
    for publication in pending:
        publication.wait()
    own = {"rng_state_1.pth", "zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert json.loads(board.read("checkpoint-10/1") or "").keys() == own
    assert verify(run.checkpoint(10)).files.keys() == own | {name.replace("_1", "_0") for name in own} | {
        "model.safetensors"
    }
