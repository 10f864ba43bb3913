"""What a dry run prints, to the letter: golden/*.txt. BBU_UPDATE_GOLDEN=1 writes them anew; read the diff."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from bbu.jobs.launch import CHECKOUT
from bbu.submit import main

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "train": ("--nodes", "2", "--cluster", "example"),
    "pipeline": ("pipeline", "--nodes", "2", "--cluster", "example"),
    "sweep": ("--sweep", "llm_lr=1e-6,5e-6", "--sweep", "seed=1,2", "--cluster", "example", "--gpus-per-node", "2"),
    "chunks": ("convert", "--cluster", "many.yaml"),
    "site": ("eval", "output-a", "output-b", "--cluster", "many.yaml"),
    "schedule": ("eval", "output-a", "--every", "30m", "--cluster", "many.yaml"),
    "local": ("pipeline", "--cluster", "local", "--set", "seed=7"),
}
MANY = {
    "convert_tasks: 16": "convert_tasks: 7",
    "modules: []": "modules: [apptainer/1.4, cuda]",
    "gpu_request: gpus-per-node": "gpu_request: gres",
    "gpu_type: null             # such as a100": "gpu_type: a100",
    "constraint: null           # features": 'constraint: "a100&nvlink" # features',
    "eval_schedule: auto": "eval_schedule: resubmit",
    "scratch: null": "scratch: /local",
    "code: checkout": "code: image",
    "image_sha256: null": f"image_sha256: {'0a' * 32}",
    "gpus_per_node: 1\n  gpu_type: null": "gpus_per_node: 1\n  gpu_type: h100",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder at a site whose arrays are small, and a profile that asks for everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr("bbu.jobs.queue.run_slurm_command", lambda argv: (0, "MaxArraySize            = 5", ""))
    text = (CHECKOUT / "configs/clusters/example.yaml").read_text()
    for old, new in MANY.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "many.yaml").write_text(text)
    for run in ("output-a", "output-b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").touch()
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_scripts_and_commands(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    config = () if "output-a" in CASES[name] else ("--config", "smoke")
    assert main([*CASES[name], *config, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for path_text, word in {str(here): "HERE", sys.executable: "PYTHON", str(CHECKOUT): "CHECKOUT"}.items():
        printed = printed.replace(path_text, word)
    printed = re.sub(r"bbu-eval-[0-9a-f]{8}", "bbu-eval-<id>", printed)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("BBU_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(printed)
    assert printed == path.read_text()
