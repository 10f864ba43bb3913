"""What several test folders share: one small demo a session, and the entries run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.commands import Demo, Finished, call, make_demo

Entry = Callable[..., Finished]
SlurmSays = Callable[..., None]


class OneForTheClusters(LoadScopeScheduling):
    """With `-n`, one worker has the real clusters to itself, and begins with them; any may take any other test."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith("tests/cluster/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneForTheClusters(config, log)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return make_demo(tmp_path_factory.mktemp("demo"), photos=12, seed=5)


@pytest.fixture
def entry(demo: Demo, tmp_path: Path) -> Entry:
    """`entry("train", "max_steps=4")` runs `python -m bbu.train --config smoke` on the demo, output in tmp_path."""

    def run(name: str, *settings: str, **options) -> Finished:
        return call(name, *demo.settings, f"output_root={tmp_path}", *settings, **options)

    return run


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmSays:
    """Stand-ins for Slurm's commands that print what real ones printed: `slurm_says("squeue", text)` makes one.

    scontrol and sacct know nothing until told otherwise; each notes its calls in `NAME.called`.
    """
    folder = tmp_path / "slurm-stand-ins"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, text: str, code: int = 0) -> None:
        (folder / f"{name}.txt").write_text(text)
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "$@" >>{folder}/{name}.called\ncat {folder}/{name}.txt\nexit {code}\n')
        program.chmod(0o755)

    make("scontrol", "slurm_load_jobs error: Invalid job id specified\n", 1)
    make("sacct", "sacct: error: Slurm accounting storage is disabled\n", 1)
    return make
