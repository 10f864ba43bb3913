"""The GPU benchmark runs: its CPU form goes through every part, in tiny sizes and with a stand-in for the kernel."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import gpu
from tests.bench._gpu_cases import TINY
from tests.bench._gpu_step import none_if_out_of_memory


def test_every_part_runs_and_agrees_with_float32_on_a_cpu(tmp_path):
    rows = gpu.measure(torch.device("cpu"), TINY, tmp_path / "out" / "gpu.json")
    assert [row for row in rows if "FAILED" in row.ours or "WRONG" in row.remark or "not run" in row.ours] == []
    written = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert [row["what"] for row in written["rows"]] == [row.what for row in rows]


def test_too_little_memory_is_a_result_and_other_errors_are_not():
    def fill_memory():
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    assert none_if_out_of_memory(fill_memory) is None
    with pytest.raises(ZeroDivisionError):
        none_if_out_of_memory(lambda: 1 / 0)  # pyright: ignore[reportArgumentType]


def test_what_is_missing_or_too_old_is_named_in_a_line_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "PACKAGES", {"torch": (99, 0), "no-such-package": (1, 2), "numpy": (1, 0)})
    old, absent = gpu.missing_packages()
    assert old.startswith("torch 2.") and old.endswith("is too old: pip install 'torch>=99.0'")
    assert absent == "no-such-package is missing: pip install 'no-such-package>=1.2'"
