"""The checkpoint contract for readers: whole or not there, whatever is broken or cut."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run import checkpoints as checkpointing
from bbu.run.checkpoints import MANIFEST, clean_leftovers, config_hash, newest, rotate, verify
from bbu.run.folder import RunFolder
from tests.checkpoints import hidden, save


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit_manifest(folder: Path, key: str, value: object) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(body | {key: value}))


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "weights cut by one byte": lambda f: truncate(f / "model.safetensors"),
    "weights emptied": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights with one bit flipped": lambda f: flip_a_byte(f / "model.safetensors"),
    "weights grown": lambda f: (f / "model.safetensors").open("ab").write(b"x"),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
    "weights a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "weights a link": lambda f: (
        shutil.move(f / "model.safetensors", f.parent / "moved"),
        (f / "model.safetensors").symlink_to(f.parent / "moved"),
    ),
    "weights a pipe": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "optimizer shard with one bit flipped": lambda f: flip_a_byte(f / "global_step" / "optim_0.pt"),
    "optimizer folder gone": lambda f: shutil.rmtree(f / "global_step"),
    "a file besides": lambda f: (f / "rng_state_1.pth").write_bytes(b"of another run"),
    "two files swapped": lambda f: (
        os.rename(f / "rng_state_0.pth", f / "t"),
        os.rename(f / "global_step" / "optim_0.pt", f / "rng_state_0.pth"),
        os.rename(f / "t", f / "global_step" / "optim_0.pt"),
    ),
    "manifest gone": lambda f: (f / MANIFEST).unlink(),
    "manifest cut": lambda f: truncate(f / MANIFEST),
    "manifest cut to half": lambda f: os.truncate(f / MANIFEST, (f / MANIFEST).stat().st_size // 2),
    "manifest emptied": lambda f: (f / MANIFEST).write_bytes(b""),
    "manifest with one bit flipped": lambda f: flip_a_byte(f / MANIFEST),
    "manifest not an object": lambda f: (f / MANIFEST).write_text("[]"),
    "manifest not text": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "manifest with another world size": lambda f: edit_manifest(f, "world_size", 8),
    "manifest without files": lambda f: edit_manifest(f, "files", {}),
    "another step's content": lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "checkpoint-10", f)),
    "emptied": lambda f: (shutil.rmtree(f), f.mkdir()),
}


def test_a_manifest_names_every_file_and_where_it_came_from(run: RunFolder):
    manifest = verify(save(run, 10))
    assert (manifest.step, manifest.world_size) == (10, 1)
    assert (manifest.config_hash, manifest.image_digest) == ("c0ffee", "sha256:1234")
    assert sorted(manifest.files) == ["global_step/optim_0.pt", "model.safetensors", "rng_state_0.pth"]
    assert manifest.files["model.safetensors"].size == 10240
    assert hidden(run) == []


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_reader_falls_back_from_a_damaged_checkpoint_and_says_so(run: RunFolder, corrupt, caplog):
    save(run, 10)
    corrupt(save(run, 20))
    found = newest(run)
    assert found is not None
    assert found.path == run.checkpoint(10)
    assert "passed over" in caplog.text
    assert "checkpoint-20" in caplog.text


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_training_on_from_the_fallback_sets_the_damaged_step_aside(run: RunFolder, corrupt):
    save(run, 10)
    corrupt(save(run, 20))
    verify(save(run, 20))
    assert hidden(run) == [".corrupt-checkpoint-20"]


def test_a_checkpoint_the_disk_cannot_read_is_passed_over(run: RunFolder, monkeypatch):
    save(run, 10)
    bad = save(run, 20) / "model.safetensors"
    original = checkpointing._hash_file

    def fail_on_bad(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(checkpointing, "_hash_file", fail_on_bad)
    found = newest(run)
    assert found is not None
    assert found.path == run.checkpoint(10)


def test_steps_compare_as_numbers_and_mtime_means_nothing(run: RunFolder):
    save(run, 100)
    save(run, 9)
    os.utime(run.checkpoint(100), (0, 0))
    found = newest(run)
    assert found is not None
    assert found.manifest.step == 100


def test_no_checkpoint_is_a_start_and_none_that_verifies_is_an_error(run: RunFolder):
    assert newest(run) is None
    truncate(save(run, 10) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints verifies"):
        newest(run)


def test_rotation_goes_by_step_and_spares_what_is_held(run: RunFolder):
    for step in (100, 9, 50, 20, 70):
        save(run, step)
    assert rotate(run, keep=2, held={20}) == [9, 50]
    assert run.steps() == [20, 70, 100]
    assert hidden(run) == []


def test_rotation_never_counts_a_damaged_checkpoint_as_kept(run: RunFolder):
    for step in (10, 20, 30):
        save(run, step)
    truncate(run.checkpoint(30) / "model.safetensors")
    assert rotate(run, keep=1) == [10]
    found = newest(run)
    assert found is not None
    assert found.manifest.step == 20


def test_what_cannot_be_deleted_stays_with_a_warning(run: RunFolder, monkeypatch, caplog):
    for step in (1, 2, 3):
        save(run, step)
    rename = os.rename

    def refuse_step_1(source: Path, target: Path) -> None:
        if Path(source).name == "checkpoint-1":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_step_1)
    assert rotate(run, keep=1) == [2]
    assert run.steps() == [1, 3] and "checkpoint-1 cannot be deleted (Permission denied)" in caplog.text


def test_a_checkpoint_whose_files_cannot_be_listed_is_not_sound(run: RunFolder, monkeypatch, caplog):
    save(run, 10)
    bad = save(run, 20) / "model.safetensors"
    is_symlink = Path.is_symlink

    def fail_on_bad(path: Path) -> bool:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return is_symlink(path)

    monkeypatch.setattr(Path, "is_symlink", fail_on_bad)
    found = newest(run)
    assert found is not None and found.path == run.checkpoint(10) and "Input/output error" in caplog.text
    save(run, 30)
    assert rotate(run, keep=1) == [10, 20]


def test_a_leftover_that_cannot_be_removed_ends_no_start(run: RunFolder, monkeypatch, caplog):
    (run.root / ".saving-checkpoint-3").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert clean_leftovers(run) == [run.root / ".saving-checkpoint-3"]
    assert "cannot be removed (Permission denied)" in caplog.text


def test_keep_zero_keeps_all(run: RunFolder):
    for step in (1, 2, 3):
        save(run, step)
    assert rotate(run, keep=0) == []
    assert run.steps() == [1, 2, 3]


def test_a_deletion_cut_short_is_finished_at_the_next_start(run: RunFolder):
    save(run, 10).rename(run.root / ".deleting-checkpoint-10")
    save(run, 20)
    clean_leftovers(run)
    assert (run.steps(), hidden(run)) == ([20], [])


def test_the_config_hash_ignores_order_and_sees_values():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_checkpointing_needs_no_torch():
    code = "import bbu.run.publishing, bbu.training.preemption, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
