"""`python -m bbu.doctor` as a program, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.doctor.findings import CHECKOUT


def run_doctor(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bbu.doctor", *arguments]
    environ = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)


def test_this_machine_is_ready(tmp_path: Path):
    done = run_doctor("--cluster", "local", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {finding["what"] for finding in json.loads(done.stdout)}
    assert any(what.startswith("2 tasks summed 64 MB over gloo") for what in lines), lines
    assert "the stop signal USR2 reached 2 of 2 tasks, and the image stayed readable" in lines
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [".gitignore"]


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys, bbu.doctor; print({'torch', 'submitit', 'transformers'} & set(sys.modules))"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n" and time.monotonic() - start < 2


def test_fewer_than_one_node_is_refused(tmp_path: Path):
    assert run_doctor("--nodes", "0", folder=tmp_path).returncode == 7
