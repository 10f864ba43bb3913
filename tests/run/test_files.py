"""Files on a shared filesystem: replaced whole, created once, dated by the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bbu.run.files import age_of, create_once, write_atomic


def test_a_failed_write_leaves_the_old_text_and_no_draft(tmp_path: Path):
    path = tmp_path / "status.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_created_once_and_leaves_no_draft(tmp_path: Path):
    (tmp_path / "drafts").mkdir()
    assert create_once(tmp_path / "a", "first", tmp_path / "drafts")
    assert not create_once(tmp_path / "a", "second", tmp_path / "drafts")
    assert (tmp_path / "a").read_text() == "first"
    assert not list((tmp_path / "drafts").iterdir())


def test_a_lost_reply_of_link_is_still_a_win_and_a_true_one_is_not(tmp_path: Path, lost_link_replies: None):
    assert create_once(tmp_path / "a", "mine", tmp_path)
    assert not create_once(tmp_path / "a", "too late", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_age_of_a_file_counts_from_the_link_though_the_sync_took_long(tmp_path: Path, monkeypatch):
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        sync(descriptor)
        os.utime(descriptor, (1, 1))  # as if what was written were that old by now

    monkeypatch.setattr(os, "fsync", slow_sync)
    create_once(tmp_path / "a", "", tmp_path)
    assert age_of(tmp_path / "a") < 60


def test_the_age_of_a_file_is_the_servers_and_not_the_caches(tmp_path: Path, cached_stats: None):
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / "7"
    path.write_text("")
    assert os.stat(path).st_mtime == 0
    assert -1 < age_of(path) < 60
