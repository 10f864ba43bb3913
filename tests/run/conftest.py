"""How NFS differs from a local disk, simulated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def lost_link_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link(2) succeeds at the server, but its reply is lost and the repeated call finds the name taken."""
    link = os.link

    def link_and_lose_the_reply(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", link_and_lose_the_reply)


@pytest.fixture
def cached_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stat` of a lease's or claim's file answers with times from 1970; `fstat` of an opened file tells the truth."""
    stat = os.stat

    def stat_from_the_cache(path: Any, **options: Any) -> os.stat_result:
        answer = stat(path, **options)
        if isinstance(path, int) or Path(path).parent.name not in (".lease", "claims"):
            return answer
        return os.stat_result((*answer[:7], 0, 0, 0))

    monkeypatch.setattr(os, "stat", stat_from_the_cache)
    monkeypatch.setattr(Path, "stat", lambda path, **options: os.stat(path, **options))
