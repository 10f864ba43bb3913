"""Builds a Memory of 2 samples and 6 patches, with or without checked shapes.

`python -m tests.models.memory_program PATCHES DTYPE [--checked]`: PATCHES and DTYPE are those of its patch_mask.
"""

from __future__ import annotations

import argparse
import importlib

import torch

from bbu.train import _check_shapes

parser = argparse.ArgumentParser()
parser.add_argument("patches", type=int)
parser.add_argument("dtype")
parser.add_argument("--checked", action="store_true")
arguments = parser.parse_args()

if arguments.checked:
    _check_shapes()
head = importlib.import_module("bbu.models.detection_head")  # after the switch, which acts on imports to come
print(hasattr(head._patch_boxes, "__wrapped__"))
samples, patches = 2, 6
head.Memory(
    patches=torch.zeros(samples, patches, 8),
    patch_mask=torch.ones(samples, arguments.patches, dtype=getattr(torch, arguments.dtype)),
    rows=torch.zeros(samples, patches).long(),
    columns=torch.zeros(samples, patches).long(),
    grid=torch.ones(samples, 2).long(),
    extent=(1, 1),
    words=torch.zeros(samples, 3, 4),
    word_mask=torch.ones(samples, 3, dtype=torch.bool),
)
print("made")
