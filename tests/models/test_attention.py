"""Attention beside transformers': varlen's boundaries and layout, windows taken together, unsafe choices refused.

The varlen kernel runs on GPUs alone; a kernel that does the same segment by segment stands in for it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.errors import ConfigError
from bbu.models import attention
from bbu.models.attention import (
    Segments,
    VarlenWindows,
    check_packing_is_safe,
    register_varlen,
    use_batched_windows,
    use_varlen_vision,
    varlen_attention,
    varlen_mask,
)
from bbu.models.tiny import build_tiny_model

GRIDS = [[1, 12, 12], [1, 4, 18], [1, 2, 2], [1, 16, 8]]


class Reference:
    """`varlen_attn` in plain sdpa; counts its calls and remembers the segments it was given."""

    def __init__(self) -> None:
        self.segments: list[list[int]] = []

    def __call__(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
    ) -> torch.Tensor:
        assert window_size in {(-1, 0), (-1, -1)} and enable_gqa == (query.shape[1] != key.shape[1])
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and int(cu_seq_q[-1]) == len(query)
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k >= max(lengths)
        self.segments.append(lengths)
        parts = zip(*(states.split(lengths) for states in (query, key, value)), strict=True)
        mixed = [
            scaled_dot_product_attention(
                *(states.transpose(0, 1)[None] for states in part),
                is_causal=window_size == (-1, 0),
                scale=scale,
                enable_gqa=enable_gqa,
            )[0].transpose(0, 1)
            for part in parts
        ]
        return torch.cat(mixed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


def load(folder, text: str = "sdpa", vision: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    chosen = {"text_config": text, "vision_config": vision}
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation=chosen)


@pytest.fixture
def reference():
    kernel = Reference()
    register_varlen(kernel)
    yield kernel
    register_varlen()


# --- varlen ---


def lengths(segments) -> list[int]:
    assert isinstance(segments, Segments) and segments.longest == segments.bounds.diff().max()
    return segments.bounds.diff().tolist()


def test_packed_samples_are_segments(folder, reference):
    model = load(folder, text="varlen")
    ids = torch.randint(0, 200, (1, 10))
    counts = torch.cat([torch.arange(3), torch.arange(1), torch.arange(4), torch.arange(2)])
    model(input_ids=ids, position_ids=counts.expand(4, 1, -1), use_cache=False)
    assert reference.segments == [[3, 1, 4, 2]] * model.config.text_config.num_hidden_layers


def test_padding_is_a_segment_of_its_own():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert lengths(varlen_mask(3, 5, 5, attention_mask=mask)) == [2, 3, 5, 4, 1]
    assert lengths(varlen_mask(2, 5, 5)) == [5, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_of_sdpa(folder, reference, side):
    ids, mask = torch.randint(0, 200, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    with torch.no_grad():
        found, wanted = (
            load(folder, text=name)(input_ids=ids, attention_mask=mask).logits for name in ("varlen", "sdpa")
        )
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=2e-5, rtol=1e-4)


def test_it_generates_what_sdpa_generates(folder, reference):
    ids, mask = torch.randint(0, 200, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found, wanted = (
        load(folder, text=name).generate(input_ids=ids, attention_mask=mask, **options) for name in ("varlen", "sdpa")
    )
    assert torch.equal(found, wanted) and reference.segments


def test_a_sliding_window_becomes_the_kernels_window_size():
    asked = []

    def kernel(query, *rest, window_size, **more):
        asked.append(window_size)
        return query

    module, states = SimpleNamespace(is_causal=True), torch.zeros(1, 2, 3, 4)
    segments = Segments.of(torch.tensor([True, False, False]))
    for options in ({}, {"sliding_window": 8}, {"is_causal": False}):
        out, _ = varlen_attention(module, states, states, states, segments, kernel=kernel, **options)
        assert out.shape == (1, 3, 2, 4)
    assert asked == [(-1, 0), (7, 0), (-1, -1)]


def test_under_autocast_the_kernel_is_given_half_precision():
    given = []

    def kernel(query, key, value, *rest, **more):
        given.append({states.dtype for states in (query, key, value)})
        return query

    module, states = SimpleNamespace(is_causal=True), torch.zeros(1, 2, 3, 4)
    segments = Segments.of(torch.tensor([True, False, False]))
    with torch.autocast("cpu", torch.bfloat16):
        varlen_attention(module, states, states, states.bfloat16(), segments, kernel=kernel)
    varlen_attention(module, states, states, states, segments, kernel=kernel)
    assert given == [{torch.bfloat16}, {torch.float32}]


def test_the_real_kernel_has_the_signature_we_call():
    import inspect

    names = list(inspect.signature(attention.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)


# --- the vision tower ---


def pixels(grids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor(grids)
    return torch.randn(int(grid.prod(-1).sum()), 1176, generator=torch.Generator().manual_seed(1)), grid


def vision(model, grids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss on the vision tower's output, and its gradients."""
    values, grid = pixels(grids)
    features = model.model.visual(values, grid_thw=grid).pooler_output
    loss = (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.model.visual.named_parameters()}


def assert_same(found, wanted) -> None:
    """To a few roundings of float32."""
    assert (found[0] - wanted[0]).abs() <= 1e-6 * wanted[0].abs()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 3e-6 * gradient.norm(), name


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [GRIDS, [[1, 8, 8]] * 3], ids=["mixed", "alike"])
def test_windows_taken_together_change_neither_loss_nor_gradients(folder, name, grids):
    model = load(folder, vision=name)
    wanted = vision(model, grids)
    use_batched_windows(model)
    assert_same(vision(model, grids), wanted)


@pytest.mark.parametrize("whole", [True, False], ids=["all windows at once", "window by window"])
def test_varlen_sees_the_same_windows_as_sdpa(folder, reference, whole):
    wanted = vision(load(folder), GRIDS)
    model = load(folder, vision="varlen")
    if whole:
        use_varlen_vision(model)
    assert_same(vision(model, GRIDS), wanted)
    assert len(reference.segments) == (model.config.vision_config.depth if whole else 0)


def test_varlen_windows_find_their_longest_themselves_where_nobody_tells(folder, reference):
    model = load(folder, vision="varlen")
    use_varlen_vision(model)
    block = model.model.visual.blocks[0].attn
    assert isinstance(block, VarlenWindows)
    rotary = torch.ones(6, block.head_dim), torch.zeros(6, block.head_dim)
    block(torch.zeros(6, block.dim), torch.tensor([0, 4, 6], dtype=torch.int32), rotary)
    assert reference.segments == [[4, 2]]


def test_another_forward_keeps_the_names_of_the_weights(folder):
    model = load(folder)
    before = set(model.state_dict())
    use_batched_windows(model)
    assert set(model.state_dict()) == before


def test_windows_taken_together_work_with_gradient_checkpointing(folder):
    model = load(folder)
    wanted = vision(model, GRIDS)
    use_batched_windows(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(vision(model, GRIDS), wanted)


# --- what is safe ---


def a_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.fixture
def model(folder):
    found = load(folder)
    found.config.use_cache = found.config.text_config.use_cache = False
    return found


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_sdpa_and_eager_are_safe(model, name):
    check_packing_is_safe(model, name, name, "packed")


def test_a_cache_is_refused_wherever_it_is_switched_on(model):
    model.config.text_config.use_cache = True
    check_packing_is_safe(model, "sdpa", "sdpa", "standard")
    with pytest.raises(ConfigError, match=r"use_cache is true in the model's text_config.*set it to false"):
        check_packing_is_safe(model, "sdpa", "sdpa", "packed")
    model.config.use_cache = True
    with pytest.raises(ConfigError) as error:
        check_packing_is_safe(model, "flex_attention", "sdpa", "packed")
    assert len(error.value.findings) == 3 and "flex_attention" in error.value.findings[2]


@pytest.mark.parametrize("keys", [("flash_attention_2", "sdpa"), ("sdpa", "flash_attention_2")])
def test_flash_attention_that_is_not_installed_is_refused(model, keys):
    with pytest.raises(ConfigError, match="flash_attn is not installed"):
        check_packing_is_safe(model, *keys, "packed")


def test_varlen_is_refused_where_it_cannot_run(model, monkeypatch):
    with pytest.raises(ConfigError) as error:
        check_packing_is_safe(model, "varlen", "varlen", "standard")
    assert [f.partition(":")[0] for f in error.value.findings] == ["attn_implementation varlen"] * 2 + [
        "vision_attn_implementation varlen"
    ] * 2
    a_gpu(monkeypatch, (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0"):
        check_packing_is_safe(model, "varlen", "sdpa", "packed", autocast_dtype=torch.bfloat16)
    a_gpu(monkeypatch, (8, 0))
    check_packing_is_safe(model, "varlen", "varlen", "packed", autocast_dtype=torch.bfloat16)
    check_packing_is_safe(model.to(torch.bfloat16), "varlen", "varlen", "packed")


def test_varlen_is_refused_with_dropout(model, monkeypatch):
    a_gpu(monkeypatch, (9, 0))
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="no dropout"):
        check_packing_is_safe(model, "varlen", "sdpa", "packed", autocast_dtype=torch.float16)


def test_segments_end_with_the_last_token():
    starts = pad(torch.zeros(4, dtype=torch.bool), (1, 0), value=True)
    assert lengths(Segments.of(starts)) == [5]
