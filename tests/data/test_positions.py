"""Our positions are the model's own, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.data.positions import mrope_positions
from bbu.models.tiny import build_tiny_model

MERGE = 2
Image = tuple[int, int]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0))


def conversation(layout: list[int | Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Types and grids of pieces in order: so many tokens of text, or an image of merged rows and columns."""
    types = [kind for p in layout for kind in ([0] * p if isinstance(p, int) else [1] * (p[0] * p[1]))]
    grids = [[1, MERGE * piece[0], MERGE * piece[1]] for piece in layout if not isinstance(piece, int)]
    return torch.tensor(types), torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def stock(model, types: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    ids = torch.zeros_like(types)[None]
    return model.model.get_rope_index(ids, mm_token_type_ids=types[None], image_grid_thw=grids)[0][:, 0]


@pytest.mark.parametrize(
    "layout",
    [
        [5],
        [3, (2, 4), 5],
        [(3, 2), 4],
        [4, (2, 2)],
        [(1, 1)],
        [2, (3, 4), 1, (4, 3), 6, (1, 7), 1],
        [(2, 5), 1, (5, 2)],
    ],
    ids=str,
)
def test_positions_equal_the_models(model, layout):
    types, grids = conversation(layout)
    assert torch.equal(mrope_positions(types, grids, MERGE), stock(model, types, grids))


sides = st.integers(1, 9)
turns = st.lists(st.tuples(st.integers(1, 12), st.tuples(sides, sides)), max_size=5)


@settings(max_examples=50, deadline=None)
@given(turns, st.integers(0, 9), st.booleans())
def test_positions_equal_the_models_on_any_layout(model, turns, tail, image_first):
    pieces = [piece for turn in turns for piece in turn]
    layout = [*pieces[image_first:], tail + (not turns)]
    types, grids = conversation(layout)
    assert torch.equal(mrope_positions(types, grids, MERGE), stock(model, types, grids))


def test_placeholders_that_do_not_fit_the_grid_are_refused():
    types, grids = conversation([2, (2, 2)])
    with pytest.raises(AssertionError, match="must agree"):
        mrope_positions(types[:-1], grids, MERGE)
