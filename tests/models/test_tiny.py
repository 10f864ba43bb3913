"""The tiny model as a command: what `--demo` of bbu.submit runs."""

from __future__ import annotations

from pathlib import Path

from bbu.models.tiny import build_tiny_model, main


def test_the_command_builds_the_model_of_its_seed(tmp_path: Path):
    assert main(["--out", str(tmp_path / "command"), "--seed", "7"]) == 0
    build_tiny_model(tmp_path / "function", seed=7)
    for path in (tmp_path / "function").iterdir():
        assert (tmp_path / "command" / path.name).read_bytes() == path.read_bytes()
