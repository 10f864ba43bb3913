"""shape_checks: wrong tensors are stopped where they cross a boundary; without it nothing is wrapped."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands import ROOT


def make_memory(patches: int = 6, dtype: str = "bool", *, checked: bool) -> subprocess.CompletedProcess[str]:
    """Build a Memory of 6 patches in a fresh process, with a mask of these patches and dtype."""
    command = [sys.executable, "-m", "tests.models.memory_program", str(patches), dtype]
    return subprocess.run([*command, *(["--checked"] * checked)], cwd=ROOT, capture_output=True, text=True)


def test_what_fits_passes_checked_or_not():
    assert make_memory(checked=True).stdout.split() == ["True", "made"]
    assert make_memory(checked=False).stdout.split() == ["False", "made"]


@pytest.mark.parametrize(("patches", "dtype"), [(7, "bool"), (6, "float32")])
def test_what_does_not_fit_is_stopped_and_named_when_checked(patches: int, dtype: str):
    checked = make_memory(patches, dtype, checked=True)
    assert checked.returncode == 1 and "patch_mask" in checked.stderr, checked.stderr
    assert make_memory(patches, dtype, checked=False).stdout.split() == ["False", "made"]
