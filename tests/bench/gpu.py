"""The true 3B architecture on one NVIDIA GPU: attention and bfloat16 held to float32, a packed step beside a stock one.

Needs an NVIDIA GPU, this checkout and its packages (torch 2.11 or newer), but no model: the weights are random. It
takes under eight minutes on an H100 and writes a JSON beside the table: BBU_BENCH_JSON, by default `build/gpu.json`.
Without a GPU it runs its CPU form, tiny sizes through the same code, which says nothing about speed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench._results import Row
from tests.commands import ROOT

if TYPE_CHECKING:
    import torch

    from tests.bench._gpu_cases import Scale

PACKAGES = {
    "torch": (2, 11), "transformers": (5, 23), "accelerate": (1, 0), "safetensors": (0, 5), "scipy": (1, 10),
    "numpy": (2, 0), "Pillow": (11, 0), "PyYAML": (6, 0), "jaxtyping": (0, 3), "tabulate": (0, 9),
}  # fmt: skip
"""Packages and the oldest version of each."""
TIME_LIMIT_S = 450.0
"""After so many seconds no further part begins."""
JSON_PATH = Path(os.environ.get("BBU_BENCH_JSON") or ROOT / "build" / "gpu.json")


def run() -> list[Row]:
    if problems := list(missing_packages()):
        raise SystemExit("\n".join(problems))
    from tests.bench import _gpu_cases

    device = _gpu_cases.choose_device()
    return measure(device, _gpu_cases.FULL if device.type == "cuda" else _gpu_cases.TINY, JSON_PATH)


def missing_packages() -> Iterator[str]:
    """One line for each package that is missing or too old."""
    for name, oldest in PACKAGES.items():
        least = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is missing: pip install '{name}>={least}'"
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < oldest:
            yield f"{name} {version} is too old: pip install '{name}>={least}'"


def measure(device: torch.device, scale: Scale, path: Path) -> list[Row]:
    """Measure part by part, print each row as it comes, and write all of them into a JSON file after each part.

    A part that fails gives a row that says so: on a borrowed machine the others are worth having.
    """
    from tests.bench import _gpu_cases

    start, rows = time.monotonic(), [_gpu_cases.describe_device(device)]
    for name, part in _gpu_cases.list_parts(device, scale):
        late = time.monotonic() - start > TIME_LIMIT_S
        rows += [Row(name, "not run", "", None, "", "out of time")] if late else _run_part(name, part)
        write_json(path, rows, time.monotonic() - start)
    return rows


def _run_part(name: str, part: Callable[[], Sequence[Row]]) -> Sequence[Row]:
    start = time.monotonic()
    try:
        rows = part()
    except Exception as error:  # whatever it is, the parts that follow can still be measured
        rows = [Row(name, "FAILED", "", None, "", f"{type(error).__name__}: {str(error).strip()[:300]}")]
    for row in rows:
        print(f"{time.monotonic() - start:6.1f} s  {row.what}: {row.ours}; {row.peer} {row.remark}", flush=True)
    return rows


def write_json(path: Path, rows: Sequence[Row], seconds: float) -> None:
    """Write the rows and the machine that they were measured on."""
    content: dict[str, Any] = {"seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
