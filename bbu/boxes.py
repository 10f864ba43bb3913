"""A box: its two forms, its overlap with another, and its way from one image's pixels to another's.

The corner form is (x1, y1, x2, y2), the centre form (cx, cy, w, h), in any common unit. The functions on many boxes
take torch tensors, with gradients, and numpy arrays alike, and return what they take; they find torch by the tensor,
so that this module does not import it. Tuples and lists of numbers become numpy arrays.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bbu.schema import Box

Array = Any
"""A torch tensor, a numpy array, or numbers in tuples or lists."""
Size = tuple[int, int]
"""(width, height) of an image in pixels; (1, 1) for boxes that are shares of the image."""

TURNED_A_QUARTER = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
SMALLEST_AREA = 1e-9
"""Keeps degenerate boxes from a division by zero: far below one pixel of the largest photo, a share of 1e-7."""


def to_corners(boxes: Array) -> Array:
    """Change boxes [..., 4] from the centre form to the corner form."""
    boxes = _as_array(boxes)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return _namespace(boxes).concatenate([centre - half, centre + half], axis=-1)


def to_centres(corners: Array) -> Array:
    """Change boxes [..., 4] from the corner form to the centre form."""
    corners = _as_array(corners)
    low, high = corners[..., :2], corners[..., 2:]
    return _namespace(corners).concatenate([(low + high) / 2, high - low], axis=-1)


def box_area(corners: Array) -> Array:
    """Area of boxes [..., 4] in the corner form: [...]; an inverted box has none."""
    corners = _as_array(corners)
    return _extent(corners[..., :2], corners[..., 2:])


def iou_and_giou(first: Array, second: Array) -> tuple[Array, Array]:
    """IoU and GIoU (Rezatofighi et al., arXiv:1902.09630) of boxes, pair by pair.

    Differentiable, and finite for degenerate boxes. Tensors are computed in float32, also where the model computes in
    half precision; arrays in their own type.

    Args:
        first, second: boxes [..., 4] in the corner form that broadcast together.

    Returns:
        Two [...].
    """
    a, b = _as_float(first), _as_float(second)
    xp = _namespace(a)
    shared = _extent(xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:]))
    union = box_area(a) + box_area(b) - shared
    iou = shared / union.clip(min=SMALLEST_AREA)
    hull = _extent(xp.minimum(a[..., :2], b[..., :2]), xp.maximum(a[..., 2:], b[..., 2:])).clip(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / hull


def pairwise_iou_and_giou(first: Array, second: Array) -> tuple[Array, Array]:
    """IoU and GIoU of every box of `first` with every box of `second`, as `iou_and_giou` computes them.

    Shapes (Q and N boxes of a sample, any leading dimensions):
        first: [..., Q, 4]; second: [..., N, 4]; returns two [..., Q, N].
    """
    first, second = _as_array(first), _as_array(second)
    return iou_and_giou(first[..., :, None, :], second[..., None, :, :])


def boxes_overlap(first: Box, second: Box) -> bool:
    """Whether two boxes share any area."""
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def scale_box(box: Box, old: Size, new: Size) -> Box:
    """Carry a box from an image of size `old` to the same image at size `new`."""
    x, y = new[0] / old[0], new[1] / old[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def turn_box(box: Box, size: Size, orientation: int) -> Box:
    """Carry a box along when its picture is turned upright.

    Args:
        box: in the corner form, in pixels of the picture as it is stored.
        size: (width, height) of the picture as it is stored.
        orientation: what has to be done to it, by EXIF 2.32, tag 274: 1 is upright. 6 and 8 undo each other, and each
            other one undoes itself.
    """
    w, h = size
    x1, y1, x2, y2 = box
    if orientation in (2, 3):  # mirrored, or turned by half
        x1, x2 = w - x2, w - x1
    if orientation in (3, 4):
        y1, y2 = h - y2, h - y1
    if orientation in (5, 7):  # transposed or transversed: mirrored along a diagonal
        x1, y1, x2, y2 = y1, x1, y2, x2
    elif orientation == 6:  # a quarter turn clockwise
        x1, y1, x2, y2 = h - y2, x1, h - y1, x2
    elif orientation == 8:  # a quarter turn counter-clockwise
        x1, y1, x2, y2 = y1, w - x2, y2, w - x1
    if orientation == 7:
        x1, y1, x2, y2 = h - x2, w - y2, h - x1, w - y1
    return x1, y1, x2, y2


def _extent(low: Any, high: Any) -> Any:
    """Area between two corners [..., 2]: [...]; not by `prod`, whose backward waits for the device."""
    sides = (high - low).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def _namespace(array: Any) -> Any:
    return np if isinstance(array, np.ndarray | np.generic) else sys.modules["torch"]


def _as_array(boxes: Any) -> Any:
    return np.asarray(boxes, dtype=float) if isinstance(boxes, tuple | list) else boxes


def _as_float(boxes: Any) -> Any:
    boxes = _as_array(boxes)
    return boxes if isinstance(boxes, np.ndarray) else boxes.float()
