"""shape_checks: wrong tensors are stopped where they cross a boundary; without it nothing is wrapped."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands import ROOT

PROGRAM = """
import torch
from bbu.train import check_shapes
{switch}
from bbu.models.detection_head import Memory, _patch_boxes
print(hasattr(_patch_boxes, "__wrapped__"))
n, p = 2, 6
Memory(patches=torch.zeros(n, p, 8), patch_mask=torch.ones(n, {mask}, dtype=torch.{dtype}),
       rows=torch.zeros(n, p).long(), columns=torch.zeros(n, p).long(), grid=torch.ones(n, 2).long(),
       words=torch.zeros(n, 3, 4), word_mask=torch.ones(n, 3, dtype=torch.bool))
print("made")
"""


def run(switch: str, mask: str = "p", dtype: str = "bool") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(switch=switch, mask=mask, dtype=dtype)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_what_fits_passes_checked_or_not():
    assert run("check_shapes()").stdout.split() == ["True", "made"]
    assert run("").stdout.split() == ["False", "made"]


@pytest.mark.parametrize(("mask", "dtype"), [("p + 1", "bool"), ("p", "float32")])
def test_what_does_not_fit_is_stopped_and_named_when_checked(mask: str, dtype: str):
    checked = run("check_shapes()", mask, dtype)
    assert checked.returncode == 1 and "patch_mask" in checked.stderr, checked.stderr
    assert run("", mask, dtype).stdout.split() == ["False", "made"]
