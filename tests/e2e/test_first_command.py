"""The README's first command without its installation: synthetic rooms in, a table and a run folder out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

pytestmark = pytest.mark.e2e


def first_command() -> list[str]:
    """The last part of the block under its marker, with this interpreter."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- first command -->\n```sh\n(.+?)\n```", text, re.DOTALL)
    assert block, "README.md: no first command after its marker"
    words = shlex.split(block[1].split("&&")[-1])
    assert words[0] == ".venv/bin/python"
    return [sys.executable, *words[1:]]


def test_it_ends_in_a_table_of_metrics_and_the_run_folder(tmp_path: Path):
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(first_command(), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, metrics, folder = done.stdout.strip().splitlines()
    assert Path(metrics).name == "metrics.json" and Path(metrics).is_file()
    run = Path(folder.removeprefix("run folder: "))
    assert {"config.yaml", "provenance.json", "status.json", "logs", "tensorboard", "eval"} <= {
        p.name for p in run.iterdir()
    }
    assert "f1@0.50" in done.stdout and "class_aware" in done.stdout
    assert "no Slurm in this profile" in done.stderr
