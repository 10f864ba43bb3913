"""The project's entries as a person calls them, and the small inputs they need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def argv_of(entry: str, arguments: Sequence[str], settings: Sequence[str]) -> list[str]:
    """`python -m bbu.ENTRY ARGUMENTS… --set SETTING…`."""
    pairs = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", f"bbu.{entry}", *arguments, *pairs]


def call(
    entry: str, *settings: str, arguments: Sequence[str] = ("--config", "smoke"), cwd: Path = ROOT, **env: str
) -> Finished:
    """Run an entry to its end, whatever that is."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        argv_of(entry, arguments, settings), cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def call_well(entry: str, *settings: str, **options) -> Finished:
    """Run an entry that must succeed."""
    done = call(entry, *settings, **options)
    assert done.code == 0, f"exit code {done.code} of bbu.{entry} {settings}\n{done.out}\n{done.err}"
    return done


@dataclass(frozen=True)
class Demo:
    """Clean synthetic photos, converted, and a tiny model; `settings` point a config at them."""

    root: Path

    @property
    def settings(self) -> list[str]:
        paths = {"vendor_dir": "vendor", "data_root": "data", "model_path": "model"}
        return [f"{key}={self.root / name}" for key, name in paths.items()]


def make_demo(root: Path, photos: int, seed: int, *settings: str) -> Demo:
    """Draw and convert `photos` small rooms and build the tiny model under `root`."""
    from bbu.config.read import load_config
    from bbu.conversion.shards import convert_shard, merge_shards
    from bbu.models.tiny import build_tiny_model
    from bbu.synthetic.rooms import write_rooms

    made = Demo(root)
    write_rooms(root / "vendor", photos, "small", seed=seed, dirt=False)
    config = load_config("smoke", overrides=[*made.settings, *settings]).data
    convert_shard(config, 0, 1)
    merge_shards(config, 1)
    build_tiny_model(root / "model", seed=42)
    return made
