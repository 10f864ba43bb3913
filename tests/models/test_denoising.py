"""Denoising queries: every object in every group, positives near their boxes and negatives further off."""

from __future__ import annotations

import torch

from bbu.models.denoising import draw_denoising_queries

TRUTH = [torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.7, 0.1, 0.3]]), torch.tensor([[0.5, 0.5, 0.4, 0.4]])]


def test_denoising_queries_hold_every_object_in_every_group_near_and_further_off():
    noise = draw_denoising_queries(TRUTH, queries=12, noise=0.4)
    assert noise is not None and noise.boxes.shape == (2, 12, 4) and int(noise.group.max()) == 2
    assert noise.valid.sum(1).tolist() == [12, 6] and noise.positive.float().mean() == 0.5
    for row, truth in enumerate(TRUTH):
        for group in range(3):
            here = (noise.group == group) & noise.positive[row] & noise.valid[row]
            assert torch.equal(noise.targets[row, here], truth)
    moved = (noise.boxes - noise.targets).abs()[..., :2] / noise.targets[..., 2:].clamp(min=1e-6)
    assert (moved[noise.positive & noise.valid] <= 0.2 + 1e-6).all()
    assert (moved[~noise.positive & noise.valid] >= 0.2 - 1e-6).all()


def test_no_object_no_denoising():
    assert draw_denoising_queries([torch.zeros(0, 4), torch.zeros(0, 4)], queries=10, noise=0.4) is None
