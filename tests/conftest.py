"""What several test folders share: one small demo a session, and the entries run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Demo, Finished, call, make_demo

Entry = Callable[..., Finished]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return make_demo(tmp_path_factory.mktemp("demo"), photos=12, seed=5)


@pytest.fixture
def entry(demo: Demo, tmp_path: Path) -> Entry:
    """`entry("train", "max_steps=4")` runs `python -m bbu.train --config smoke` on the demo, output in tmp_path."""

    def run(name: str, *settings: str, **options) -> Finished:
        return call(name, *demo.settings, f"output_root={tmp_path}", *settings, **options)

    return run
