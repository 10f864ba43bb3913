"""Counts the operations for which a GPU's host would wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def device_waits(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the waits in a call: copies to the host, and reads of single values or of how many are True.

    By the profiler, because autograd and boolean indexing read inside C++, where a dispatch mode sees nothing.
    """
    copies: list[str] = []
    for name in ("cpu", "tolist"):
        stock = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, n=name, s=stock: copies.append(n) or s(tensor))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    monkeypatch.undo()
    reads = {"aten::_local_scalar_dense", "aten::nonzero"}
    return copies + [event.name for event in profiled.events() or () if event.name in reads]
