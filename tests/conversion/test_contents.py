"""What a file held: read without waiting, and compared by contents where times or size differ."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bbu.conversion.contents import HashBudget, confirm_facts, observe_file, read_file, write_file
from bbu.conversion.rejects import Unusable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"one")
    return tmp_path / "file"


def test_an_unchanged_file_is_confirmed_without_reading_it(path: Path) -> None:
    _, facts = read_file(path, 3)
    assert confirm_facts(path, facts, HashBudget(0)) == facts


def test_a_touched_file_is_confirmed_by_its_hash(path: Path) -> None:
    _, facts = read_file(path, 3)
    os.utime(path, ns=(1, 1))
    confirmed = confirm_facts(path, facts)
    assert confirmed and (confirmed.sha256, confirmed.mtime_ns) == (facts.sha256, 1)
    assert confirm_facts(path, facts, HashBudget(2)) is None, "there is no budget to find out"


@pytest.mark.parametrize("content", [b"two", b"longer", b""])
def test_other_contents_are_noticed_even_with_the_old_time(path: Path, content: bytes) -> None:
    _, facts = read_file(path, 3)
    path.write_bytes(content)
    os.utime(path, ns=(facts.mtime_ns, facts.mtime_ns))
    assert confirm_facts(path, facts) is None


def test_what_takes_the_place_of_a_file_is_noticed(path: Path) -> None:
    _, facts = read_file(path, 3)
    absent = observe_file(path.with_name("none"))
    path.unlink()
    assert confirm_facts(path, facts) is None and confirm_facts(path, absent) == absent
    os.mkfifo(path)
    assert confirm_facts(path, facts) is None and confirm_facts(path, absent) is None


def test_a_budget_is_spent_once() -> None:
    budget = HashBudget(10)
    assert [budget.take(size) for size in (6, 6, 4, 1)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "no_plain_file"),
        (os.mkdir, "no_plain_file"),
        (lambda path: path.symlink_to("/dev/zero"), "no_plain_file"),
        (lambda path: path.symlink_to("/dev/tty"), "unreadable_file|no_plain_file"),
        (lambda path: path.symlink_to(path), "missing_file"),
        (lambda path: path.symlink_to("nothing"), "missing_file"),
        (lambda path: None, "missing_file"),
        (lambda path: path.write_bytes(b"x" * 11), "oversized_file"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40), "oversized_file"),
    ],
)
def test_what_is_no_readable_file_has_a_reason_that_names_it(tmp_path: Path, make, reason: str) -> None:
    make(tmp_path / "p.json")
    with pytest.raises(Unusable, match=reason) as caught:
        read_file(tmp_path / "p.json", 10)
    assert "p.json" in caught.value.detail


def test_trouble_of_the_machine_is_no_fault_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Too many"):
        read_file(path, 3)


def test_a_file_is_written_whole_whatever_the_length_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 255)
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fill_up(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "p.jpeg", b"one")
    assert caught.value.filename == str(tmp_path / "p.jpeg") and not list(tmp_path.iterdir())
