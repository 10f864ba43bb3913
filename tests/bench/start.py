"""From the start of a process to its first optimizer step, beside a plain Trainer script on the same records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench._results import Row
from tests.commands import ROOT, make_demo

SIZES, REPEATS = (200, 5_000), 3
WAYS = {
    "padded batches": ("collator_type=standard",),
    "packed rows": ("collator_type=packed", "per_device_train_batch_size=1", "max_total_length=2048"),
}


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        demo = make_demo(Path(folder), photos=40, seed=3)
        return [row for records in SIZES for row in measure(demo.settings, Path(folder), records)]


def measure(demo: list[str], folder: Path, records: int) -> list[Row]:
    write_records(folder / "data" / "train.jsonl", records)
    settings = [*demo, f"output_root={folder}", "num_train_epochs=10", "max_steps=-1", "detection_enabled=false"]
    peer: dict[str, float] = {}
    ours: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    for number in range(REPEATS):  # in turns, because the machine may be shared
        keep_least(peer, first_step("plain", [*settings, "collator_type=standard"]))
        for way, options in WAYS.items():
            keep_least(ours[way], first_step("ours", [*settings, *options, f"run_name=start-{way[:6]}-{number}"]))
    return [
        Row(
            f"to the first step, {records:,} records, ten epochs, {way}",
            describe(best),
            f"plain Trainer script {describe(peer)}",
            peer["cpu"] / best["cpu"],
            "0.91x",
            "CPU time, with the first step; packing draws the teachers of ten epochs",
        )
        for way, best in ours.items()
    ]


def first_step(which: str, settings: list[str]) -> dict[str, float]:
    """Seconds of wall and CPU time of one process to its first step."""
    command = [sys.executable, "-m", "tests.bench._first_step", str(time.time()), which, *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def keep_least(best: dict[str, float], result: dict[str, float]) -> None:
    best.update({name: min(seconds, best.get(name, seconds)) for name, seconds in result.items()})


def describe(seconds: dict[str, float]) -> str:
    return f"{seconds['cpu']:.1f} s of CPU, {seconds['wall']:.1f} s of wall time"


def write_records(path: Path, count: int) -> None:
    """Repeat the records of the file until there are `count`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[index % len(lines)] for index in range(count)), encoding="utf-8")
