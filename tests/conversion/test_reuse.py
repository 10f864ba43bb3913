"""Whatever one photo raises is its own reject; what the machine lacks ends the conversion."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bbu.conversion import images, photo, reuse
from bbu.conversion.labels import load_rules
from bbu.conversion.listing import list_vendor_folder
from bbu.conversion.rejects import Reject
from bbu.conversion.reuse import PhotoResult, convert_photos, is_worth_another_try
from bbu.errors import DataError
from tests.conversion.vendor_folder import config_of, jpeg, put, put_photo, record


def convert(tmp_path: Path, **changes: object) -> dict[str, PhotoResult]:
    config = config_of(tmp_path / "vendor", tmp_path / "data", **changes)
    photos = list_vendor_folder(tmp_path / "vendor").photos
    return {result.files.name: result for result in convert_photos(photos, config, load_rules(config))}


def reject_of(result: PhotoResult) -> Reject:
    (reject,) = result.outcome.rejects
    assert result.outcome.photo is None and result.written is None and reject.index is None
    return reject


def fail_at(monkeypatch: pytest.MonkeyPatch, color: str, fail: Callable[[], object]) -> None:
    """Let the decoding of photos of one colour fail."""
    patch_all_processes(monkeypatch, photo, "make_resized", partial(fail_or_make, color, fail))


def fail_or_make(color: str, fail: Callable[[], object], data: bytes, *arguments: Any) -> bytes:
    if data == jpeg(color):
        fail()
    return images.make_resized(data, *arguments)


def patch_all_processes(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, replacement: Any) -> None:
    """Patch a name of a module here and in the processes that convert."""
    monkeypatch.setattr(module, name, replacement)
    start = partial(
        ProcessPoolExecutor, mp_context=multiprocessing.get_context("forkserver"), initializer=patch_this_process,
        initargs=(module.__name__, name, replacement),
    )  # fmt: skip
    monkeypatch.setattr(reuse, "_start_pool", start)


def patch_this_process(module: str, name: str, replacement: Any) -> None:
    setattr(importlib.import_module(module), name, replacement)


def raise_error(error: BaseException, *_: object) -> object:
    raise error


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ({"p.json": record()}, "missing_image", "no p.jpeg or .jpg beside the JSON"),
        ({"p.json": record(), "p.png": b""}, "missing_image", "but p.png"),
        ({"p.jpeg": jpeg()}, "missing_json", "no JSON beside it"),
        ({"p.json": record(), "p.jpg": jpeg(), "p.jpeg": jpeg()}, "ambiguous_image", "p.jpeg and p.jpg"),
        ({"p.json": record(), "p.JSON": record(), "p.jpg": jpeg()}, "ambiguous_json", "p.JSON and p.json"),
        ({"p.json": b"", "p.jpeg": jpeg()}, "broken_json", "empty"),
        ({"p.json": record(), "p.jpeg": b""}, "undecodable_image", "empty"),
        ({"p.json": record().decode().encode("gbk"), "p.jpeg": jpeg()}, "wrong_encoding", "GBK"),
        ({"p.json": record() + b" " * 2**22, "p.jpeg": jpeg()}, "oversized_file", "p.json"),
    ],
)
def test_a_photo_without_two_usable_files_has_a_reason(tmp_path: Path, files: dict, reason: str, detail: str) -> None:
    put_photo(tmp_path / "vendor", "good")
    for name, content in files.items():
        put(tmp_path / "vendor", name, content)
    results = convert(tmp_path)
    assert results["good"].outcome.photo
    reject = reject_of(results["p"])
    assert reject.reason == reason and detail in reject.detail


@pytest.mark.parametrize("half", ["p.json", "p.jpeg"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dead link", "device"])
def test_what_stands_in_place_of_a_file_is_that_photos_reject(tmp_path: Path, half: str, kind: str) -> None:
    put_photo(tmp_path / "vendor", "good")
    put_photo(tmp_path / "vendor", "p")
    path = tmp_path / "vendor" / half
    path.unlink()
    {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "dead link": lambda path: os.symlink("nothing", path),
        "device": lambda path: os.symlink("/dev/zero", path),
    }[kind](path)
    results = convert(tmp_path)
    assert results["good"].outcome.photo and reject_of(results["p"]).detail


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("deep"),
        ValueError("x" * 9999),
        OSError(errno.EIO, "Input/output error"),
        KeyError(1),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("processes", [1, 2])
def test_whatever_one_photo_raises_is_its_reject(tmp_path, monkeypatch, error: Exception, processes: int) -> None:
    for name, color in {"a": "grey", "bad": "red", "c": "grey"}.items():
        put_photo(tmp_path / "vendor", name, color)
    fail_at(monkeypatch, "red", partial(raise_error, error))
    results = convert(tmp_path, convert_processes=processes)
    assert results["a"].outcome.photo and results["c"].outcome.photo
    reject = reject_of(results["bad"])
    assert reject.reason == "failed" and reject.detail.startswith(f"{type(error).__name__}: {str(error)[:50]}")
    assert is_worth_another_try(results["bad"]) and len(reject.detail) < 1000


def test_a_photo_that_kills_its_process_is_rejected_and_the_others_are_converted(tmp_path, monkeypatch) -> None:
    for index in range(12):
        put_photo(tmp_path / "vendor", f"p{index:02d}", "red" if index == 5 else "grey")
    fail_at(monkeypatch, "red", kill_this_process)
    results = convert(tmp_path, convert_processes=2)
    assert [name for name, result in results.items() if not result.outcome.photo] == ["p05"]
    assert "killed" in reject_of(results["p05"]).detail


def test_a_file_that_vanishes_is_its_photos_reject(tmp_path: Path) -> None:
    put_photo(tmp_path / "vendor", "good")
    put_photo(tmp_path / "vendor", "p")
    config = config_of(tmp_path / "vendor", tmp_path / "data")
    photos = list_vendor_folder(tmp_path / "vendor").photos
    (tmp_path / "vendor/p.jpeg").unlink()
    good, gone = convert_photos(photos, config, load_rules(config))
    assert good.outcome.photo and reject_of(gone).reason == "missing_file"


def test_a_vendor_folder_that_has_gone_ends_the_conversion(tmp_path: Path) -> None:
    put_photo(tmp_path / "vendor", "p")
    config = config_of(tmp_path / "vendor", tmp_path / "data")
    photos = list_vendor_folder(tmp_path / "vendor").photos
    (tmp_path / "vendor").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="has gone"):
        convert_photos(photos, config, load_rules(config))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS])
def test_a_photo_that_cannot_be_written_ends_the_conversion(tmp_path, monkeypatch, code: int, processes: int) -> None:
    for name in "abc":
        put_photo(tmp_path / "vendor", name)
    patch_all_processes(monkeypatch, reuse, "write_file", partial(refuse_to_write, code))
    with pytest.raises(OSError) as caught:
        convert(tmp_path, convert_processes=processes)
    assert caught.value.errno == code and "data" in caught.value.filename


def test_photos_convert_in_other_processes_after_some_in_this_one(tmp_path: Path) -> None:
    """The threads of libvips do not survive a fork."""
    for name in "abc":
        put_photo(tmp_path / "vendor", name)
    assert convert(tmp_path)["a"].outcome.photo
    others = convert(tmp_path, convert_processes=2)
    assert all(result.outcome.photo for result in others.values())


def refuse_to_write(code: int, path: Path, data: bytes) -> None:
    raise OSError(code, os.strerror(code), str(path))


def test_too_many_open_files_are_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_photo(tmp_path / "vendor", "p", "red")
    fail_at(monkeypatch, "red", partial(raise_error, OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError, match="Too many"):
        convert(tmp_path)
