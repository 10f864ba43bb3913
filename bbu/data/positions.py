"""Positions of tokens along time, height and width (mRoPE), as Qwen2.5-VL computes them, without a model.

Text advances on all three axes at once. The placeholders of an image take the rows and columns of its merged grid,
counted from where the text stopped; the text after it continues behind the longer side of the grid. The rule comes
from Qwen2-VL (arXiv:2409.12191, section 2.1).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_IMAGE = 1
"""Token type of an image placeholder; that of text is 0."""


def mrope_positions(mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Positions of the tokens of one conversation: [3, S] int64, (time, height, width).

    Args:
        mm_token_type_ids: [S] int64, 1 at image placeholders, 0 at text.
        image_grid_thw: [I, 3] int64, (time, rows, columns) of each image in patches.
        merge_size: a square of merge_size x merge_size patches becomes one placeholder.

    Shapes: S tokens, I images.
    """
    is_image = mm_token_type_ids == _IMAGE
    grid = image_grid_thw // image_grid_thw.new_tensor([1, merge_size, merge_size])
    ends = grid.prod(-1).cumsum(0)  # [I]: number of placeholders up to the end of each image
    assert not (mm_token_type_ids > _IMAGE).any(), "only text and images have positions here"
    assert int(is_image.sum()) == int(grid.prod(-1).sum()), "placeholders and image_grid_thw must agree"
    # Number of placeholders before each token, and from it the number of images that end before the token. For a
    # placeholder, that is the index of its image.
    earlier = is_image.cumsum(0) - is_image.long()
    image = torch.searchsorted(ends, earlier, right=True)
    # Every token before counts one if it is text; every image before counts the longer side of its grid.
    extents = pad(grid[:, 1:].amax(-1).cumsum(0), (1, 0))
    text = (~is_image).cumsum(0) - (~is_image).long()
    positions = (text + extents[image]).repeat(3, 1)
    # A placeholder adds its place in its image's grid.
    image_of_placeholder = image[is_image]
    number = earlier[is_image] - pad(ends, (1, 0))[image_of_placeholder]
    positions[:, is_image] += _grid_cells(number, grid[image_of_placeholder])
    return positions


def _grid_cells(number: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """(time, row, column) of cell `number` [M] of a grid [M, 3], counted row by row: [3, M] (M placeholders)."""
    _, rows, columns = grid.unbind(-1)
    return torch.stack([number // (rows * columns), number // columns % rows, number % columns])
