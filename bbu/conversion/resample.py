"""Resamples pictures with Lanczos windows, as Pillow does, in half its time: as products of small matrices.

The weights are multiples of 2**-14. A sum of samples of 8 bits times such weights is exact in float32, whatever the
order of its terms, so that every BLAS on every processor gives the same bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_LOBES = 3
_ONE = 2**14
"""Weights in these units are whole numbers that add up to 2**14. Their absolute values add up to less than 1.5 * 2**14,
so that no sum exceeds 255 * 1.5 * 2**14, which is below 2**24: float32 has 24 bits."""
_BLOCK = 8
"""Results of one product: they read nearly the same samples, and more of them would multiply more zeros."""
_ONE_THREAD = 2**18
"""Multiplications up to which OpenBLAS takes no second thread for a product (its interface/gemm.c): photos are
converted in as many processes as there are cores."""

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]


def resample_picture(pixels: _Bytes, size: tuple[int, int]) -> _Bytes:
    """Resample a picture; the rows first, which leaves less to do for the columns.

    Args:
        pixels: (height, width, channels).
        size: (width, height) of the result.

    Returns:
        (height, width, channels) of `size`. Pillow's result differs where it rounds between the two steps.
    """
    height, width, channels = pixels.shape
    rows = _resample_rows(pixels.reshape(height, width * channels), size[1])
    return _resample_columns(rows, channels, size[0]).reshape(size[1], size[0], channels)


def _resample_rows(samples: _Bytes, target: int) -> _Bytes:
    """(rows, columns) → (target, columns)."""
    starts, weights = _block_weights(len(samples), target)
    columns, span = samples.shape[1], weights.shape[2]
    step = min(columns, max(1, _ONE_THREAD // (_BLOCK * span)))
    results = np.empty((target, columns), np.uint8)
    source = np.empty((len(samples), step), np.float32)
    sums = np.empty((len(starts) * _BLOCK, step), np.float32)
    for left in range(0, columns, step):
        right = min(left + step, columns)
        strip, part = source[:, : right - left], sums[:, : right - left]
        np.copyto(strip, samples[:, left:right])
        for index, start in enumerate(starts):
            top = index * _BLOCK
            np.matmul(weights[index], strip[start : start + span], out=part[top : top + _BLOCK])
        _round_to_bytes(part[:target], results[:, left:right])
    return results


def _resample_columns(samples: _Bytes, channels: int, target: int) -> _Bytes:
    """(rows, columns * channels) → (rows, target * channels)."""
    starts, weights = _channel_weights(samples.shape[1] // channels, target, channels)
    rows, (_, span, block) = len(samples), weights.shape
    step = min(rows, max(1, _ONE_THREAD // (span * block)))
    results = np.empty((rows, target * channels), np.uint8)
    source = np.empty((step, samples.shape[1]), np.float32)
    sums = np.empty((step, len(starts) * block), np.float32)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        strip, part = source[: bottom - top], sums[: bottom - top]
        np.copyto(strip, samples[top:bottom])
        for index, start in enumerate(starts):
            left = index * block
            np.matmul(strip[:, start : start + span], weights[index], out=part[:, left : left + block])
        _round_to_bytes(part[:, : target * channels], results[top:bottom])
    return results


def _round_to_bytes(sums: _Floats, results: _Bytes) -> None:
    """Round sums into `results`; a window's negative lobes lead beyond 0..255. The sums are lost."""
    np.clip(sums, 0, 255, out=sums)
    np.rint(sums, out=results, casting="unsafe")  # rounds and converts piece by piece in the cache


@lru_cache(maxsize=16)
def _block_weights(length: int, target: int) -> tuple[list[int], _Floats]:
    """Weights by which `target` results are made of `length` samples, `_BLOCK` results at a time.

    Returns:
        For each block the first sample that it reads; weights (blocks, _BLOCK, span) over `span` samples from there.
    """
    stretch = max(length / target, 1.0)  # a picture that grows is interpolated
    centers = (np.arange(target) + 0.5) * (length / target)
    taps = min(math.ceil(2 * _LOBES * stretch) + 1, length)
    firsts = np.clip((centers - _LOBES * stretch + 0.5).astype(np.int64), 0, length - taps)
    distances = (firsts[:, None] + np.arange(taps) + 0.5 - centers[:, None]) / stretch
    values = np.sinc(distances) * np.sinc(distances / _LOBES) * (np.abs(distances) < _LOBES)
    values = np.rint(values / values.sum(axis=1, keepdims=True) * _ONE)
    results = np.arange(target)
    values[results, values.argmax(axis=1)] += _ONE - values.sum(axis=1)  # a plain area keeps its colour
    starts, block, row = firsts[::_BLOCK], results // _BLOCK, results % _BLOCK
    span = min(int((firsts - starts[block]).max()) + taps, length)
    starts = np.minimum(starts, length - span)
    weights = np.zeros((len(starts), _BLOCK, span), np.float32)
    weights[block[:, None], row[:, None], (firsts - starts[block])[:, None] + np.arange(taps)] = values / _ONE
    return starts.tolist(), weights


@lru_cache(maxsize=16)
def _channel_weights(length: int, target: int, channels: int) -> tuple[list[int], _Floats]:
    """As `_block_weights` for pixels whose channels lie side by side: (blocks, span * channels, _BLOCK * channels)."""
    starts, weights = _block_weights(length, target)
    spread = np.kron(weights.transpose(0, 2, 1), np.eye(channels, dtype=np.float32)[None])
    return [start * channels for start in starts], spread
