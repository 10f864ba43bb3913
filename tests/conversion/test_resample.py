"""Resampling: as Pillow's, and exact, so that it depends on no BLAS and no processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bbu.conversion.resample import _ONE, _block_weights, resample_picture

SIZES = [
    ((1440, 1080), (532, 392)),
    ((300, 401), (28, 56)),
    ((90, 70), (308, 224)),
    ((1, 3), (56, 28)),
    ((57, 1), (9, 5)),
]
"""(width, height) before and after."""


def noise(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Levels far enough from 0 and 255 that no window leads beyond them: there the order of the two steps matters."""
    return np.random.default_rng(0).integers(80, 176, (size[1], size[0], channels), np.uint8)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_result_is_that_of_pillow_within_the_rounding_between_two_steps(before, after) -> None:
    pixels = noise(before)
    expected = np.asarray(Image.fromarray(pixels).resize(after, Image.Resampling.LANCZOS)).astype(int)
    difference = resample_picture(pixels, after) - expected
    assert difference.shape == (after[1], after[0], 3) and np.abs(difference).max() <= 2


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_sums_are_exact(before, after) -> None:
    pixels = noise(before)
    rows = in_integers(pixels, after[1])
    assert np.array_equal(resample_picture(pixels, after), in_integers(rows.swapaxes(0, 1), after[0]).swapaxes(0, 1))


def in_integers(samples: np.ndarray, target: int) -> np.ndarray:
    """Resample the first axis with the same weights, in 64 bits."""
    starts, weights = _block_weights(len(samples), target)
    span = weights.shape[2]
    units = (weights * _ONE).astype(np.int64)
    sums = [
        np.tensordot(block, samples[at : at + span].astype(np.int64), 1)
        for at, block in zip(starts, units, strict=True)
    ]
    half_to_even = np.rint(np.concatenate(sums)[:target] / _ONE)
    return np.clip(half_to_even, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_weights_add_up_to_one_and_their_sums_fit_the_24_bits_of_float32(before, after) -> None:
    for length, target in zip(before, after, strict=True):
        units = np.concatenate(_block_weights(length, target)[1])[:target].astype(np.float64) * _ONE
        assert np.array_equal(units.sum(axis=1), np.full(target, _ONE))
        assert np.array_equal(units, np.rint(units)) and 255 * np.abs(units).sum(axis=1).max() < 2**24


def test_plain_picture_keeps_its_colour() -> None:
    plain = np.full((480, 640, 3), (3, 120, 255), np.uint8)
    assert np.unique(resample_picture(plain, (252, 196)).reshape(-1, 3), axis=0).tolist() == [[3, 120, 255]]
