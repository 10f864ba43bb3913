"""Where things lie in a batch: computed once on the host, so that no forward pass has to wait for the device.

transformers 5.23 computes window indices, positions and bounds from `image_grid_thw` in every forward pass, and each
read of that tensor waits until the device has caught up. Its vision tower takes them from keyword arguments instead
where they are given. All functions here work on the CPU, in a loader's worker.

Shapes: I images of P patches together, one placeholder for each `unit` patches, N samples, B rows of S tokens,
M placeholders, K segments, Q patches of the largest student image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index


class Groups(TypedDict):
    """Windows (or images) of a batch, grouped by their length, so that each group is one call of the attention."""

    lengths: tuple[int, ...]
    """Length in patches of the windows of each group."""
    counts: tuple[int, ...]
    """Number of windows in each group."""
    order: torch.Tensor
    """[P] int64: the patches sorted by group."""
    restore: torch.Tensor
    """[P] int64: the inverse of `order`."""


class VisionLayout(TypedDict):
    """What the vision tower would compute from image_grid_thw; transformers' names, except for the last two."""

    window_index: torch.Tensor
    """[P / unit] int64: the placeholders, window by window."""
    cu_window_seqlens: torch.Tensor
    """[windows + 1] int32: bounds of the windows in patches."""
    cu_seqlens: torch.Tensor
    """[I + 1] int32: bounds of the images in patches."""
    position_ids: torch.Tensor
    """[P, 2] int64: row and column of each patch, in the order of pixel_values."""
    max_seqlen: int
    """Patches of the largest image."""
    max_window_seqlen: int
    """Patches of the largest window."""
    windows: Groups
    """The windows, for an attention that is not given bounds."""
    images: Groups
    """The images, for the layers that attend to all of an image."""


class TextLayout(TypedDict):
    """Where samples and placeholders lie in the rows of tokens."""

    placeholders: torch.Tensor
    """[M] int64: index of each image placeholder in the rows laid end to end."""
    lengths: tuple[int, ...]
    """Tokens of each sample of a packed row, its padding at the end included; empty for padded rows."""
    bounds: torch.Tensor
    """[K + 1] int32: first token of each of these samples, then the end of the row."""


class HeadLayout(TypedDict):
    """Where the patches of the N student images lie."""

    patches: torch.Tensor
    """[N, Q] int64: index of each patch among the vision tower's last states; 0 at padding."""
    mask: torch.Tensor
    """[N, Q] bool: True at real patches."""
    places: torch.Tensor
    """[N, Q, 2] int64: row and column of each patch; 0 at padding."""
    grid: torch.Tensor
    """[N, 2] int64: numbers of rows and columns."""
    extent: tuple[int, int]
    """The most rows, and the most columns, of any image."""


class Layout(TypedDict):
    """Whatever the parts of the model need that a batch is for."""

    vision: VisionLayout
    """For the vision tower."""
    text: TextLayout | None
    """For the language model; None where the batch has no tokens for it."""
    head: HeadLayout | None
    """For the detection head; None where the batch has no student images."""


def plan_layout(batch: Mapping[str, Any], vision_config: Any) -> Layout:
    """Compute the layout of a batch of either collator, for the parts of the model whose inputs it holds.

    Args:
        batch: image_grid_thw, and for the language model input_ids, mm_token_type_ids and (packed) position_ids, for
            the head student_images. Tensors on a device are read from there, for which the host waits.
        vision_config: the model's; it states the sizes of patches and windows.
    """
    grid, unit = batch["image_grid_thw"].cpu(), vision_config.spatial_merge_size**2
    vision, types, students = (
        plan_vision(grid, vision_config),
        batch.get("mm_token_type_ids"),
        batch.get("student_images"),
    )
    is_packed = batch.get("attention_mask") is None and batch.get("position_ids") is not None
    positions = batch["position_ids"].cpu() if is_packed else None
    return Layout(
        vision=vision,
        text=None if types is None else _plan_text(types.cpu(), positions),
        head=None if students is None else _plan_head(grid, students.tolist(), vision, unit),
    )


def plan_vision(grid: torch.Tensor, config: Any) -> VisionLayout:
    """grid: [I, 3] int64 on the CPU, (time, rows, columns) of each image in patches; config: the vision tower's."""
    index, windows = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
    images = get_vision_cu_seqlens(grid)
    return VisionLayout(
        window_index=index,
        cu_window_seqlens=windows,
        cu_seqlens=images,
        position_ids=get_vision_position_ids(grid, config.spatial_merge_size),
        max_seqlen=int(images.diff().max()),
        max_window_seqlen=int(windows.diff().max()),
        windows=_group_by_length(windows),
        images=_group_by_length(images),
    )


def _group_by_length(bounds: torch.Tensor) -> Groups:
    """Group windows by length; bounds: [windows + 1], where each begins, then the end of the last."""
    sizes = bounds.diff().long()
    # A stable sort keeps the patches of a window together.
    order = sizes.repeat_interleave(sizes).argsort(stable=True)
    lengths, counts = (tuple(values.tolist()) for values in sizes.unique(return_counts=True))
    return Groups(lengths=lengths, counts=counts, order=order, restore=order.argsort())


def _plan_text(mm_token_type_ids: torch.Tensor, packed_positions: torch.Tensor | None) -> TextLayout:
    """mm_token_type_ids: [B, S], 1 at placeholders; packed_positions: [4, 1, S], None for padded rows."""
    starts = torch.zeros(0, dtype=torch.int64)
    if packed_positions is not None:
        starts = (packed_positions[0, 0] == 0).nonzero().flatten()  # each sample counts its tokens from 0
    bounds = pad(starts, (0, 1), value=mm_token_type_ids.shape[1]).to(torch.int32)
    placeholders = mm_token_type_ids.flatten().nonzero().flatten()
    return TextLayout(placeholders=placeholders, lengths=tuple(bounds.diff().tolist()), bounds=bounds)


def _plan_head(grid: torch.Tensor, students: Sequence[int], vision: VisionLayout, unit: int) -> HeadLayout:
    """grid: [I, 3]; students: image of each of N samples; unit: patches of a placeholder."""
    # The tower works on patches ordered window by window, `unit` patches (one placeholder) at a time: undo that.
    order = (vision["window_index"].argsort()[:, None] * unit + torch.arange(unit)).flatten()
    sizes = grid.prod(-1).tolist()
    patches, places = ([part.split(sizes)[i] for i in students] for part in (order, vision["position_ids"]))
    grids = grid[students, 1:]
    return HeadLayout(
        patches=pad_sequence(patches, batch_first=True),
        mask=pad_sequence([torch.ones_like(rows, dtype=torch.bool) for rows in patches], batch_first=True),
        places=pad_sequence(places, batch_first=True),
        grid=grids,
        extent=(int(grids[:, 0].max()), int(grids[:, 1].max())),
    )
