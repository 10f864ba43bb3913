"""Where a token stands: Qwen2.5-VL's positions along time, height and width (mRoPE), without a model.

Text moves along all three axes at once. An image's placeholders spread over rows and columns of its merged grid
from where the text stopped, and the text goes on behind the grid's longer side. The rule is that of Qwen2-VL
(arXiv:2409.12191, section 2.1).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

IMAGE = 1
"""The token type of an image placeholder; text is 0."""


def mrope_positions(mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """[3, S] int64 (time, height, width) of one conversation of text and images.

    mm_token_type_ids: [S] int64. image_grid_thw: [I, 3] int64, in patches; merge_size patches a side make one
    placeholder.
    """
    is_image = mm_token_type_ids == IMAGE
    grid = image_grid_thw // image_grid_thw.new_tensor([1, merge_size, merge_size])
    ends = grid.prod(-1).cumsum(0)  # [I], in placeholders
    assert not (mm_token_type_ids > IMAGE).any(), "only text and images have positions here"
    assert int(is_image.sum()) == int(grid.prod(-1).sum()), "placeholders and image_grid_thw must agree"
    earlier = is_image.cumsum(0) - is_image.long()  # placeholders before each token
    image = torch.searchsorted(ends, earlier, right=True)  # images wholly before it: at a placeholder, its own
    extents = pad(grid[:, 1:].amax(-1).cumsum(0), (1, 0))
    text = (~is_image).cumsum(0) - (~is_image).long()
    positions = (text + extents[image]).repeat(3, 1)
    own = image[is_image]
    positions[:, is_image] += _cells(earlier[is_image] - pad(ends, (1, 0))[own], grid[own])
    return positions


def _cells(number: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """[3, P] (time, row, column) of the number-th cell of a [P, 3] grid, counted row by row."""
    _, rows, columns = grid.unbind(-1)
    return torch.stack([number // (rows * columns), number // columns % rows, number % columns])
