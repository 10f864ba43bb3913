"""Attention beside transformers': varlen's bounds and layout, all windows in one call, unsafe choices refused.

The varlen kernel runs on GPUs alone; a kernel that computes the same segment by segment stands in for it.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from bbu.errors import ConfigError
from bbu.models import attention
from bbu.models.attention import (
    _all_segments,
    _Segments,
    _segments_or_mask,
    _varlen_attention,
    _VarlenWindows,
    check_packing_is_safe,
)
from bbu.models.tiny import build_tiny_model
from tests.models.stand_ins import load_bbu_model, load_stock_model, registered_reference_kernel

GRIDS = [[1, 12, 12], [1, 4, 18], [1, 2, 2], [1, 16, 8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def kernel():
    with registered_reference_kernel() as kernel:
        yield kernel


# --- varlen ---


def segment_lengths(segments) -> list[int]:
    assert isinstance(segments, _Segments) and segments.longest == segments.bounds.diff().max()
    return segments.bounds.diff().tolist()


def test_packed_samples_are_segments(folder, kernel):
    model = load_stock_model(folder, text="varlen")
    ids = torch.randint(0, 200, (1, 10))
    counts = torch.cat([torch.arange(3), torch.arange(1), torch.arange(4), torch.arange(2)])
    model(input_ids=ids, position_ids=counts.expand(4, 1, -1), use_cache=False)
    assert kernel.segments == [[3, 1, 4, 2]] * model.config.text_config.num_hidden_layers


def test_padding_is_a_segment_of_its_own():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert segment_lengths(_segments_or_mask(3, 5, 5, attention_mask=mask, find_segments=_all_segments)) == [
        2,
        3,
        5,
        4,
        1,
    ]
    assert segment_lengths(_segments_or_mask(2, 5, 5, find_segments=_all_segments)) == [5, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_of_sdpa(folder, kernel, side):
    ids, mask = torch.randint(0, 200, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    with torch.no_grad():
        varlen, sdpa = (
            load_stock_model(folder, text=name)(input_ids=ids, attention_mask=mask).logits
            for name in ("varlen", "sdpa")
        )
    torch.testing.assert_close(varlen[mask.bool()], sdpa[mask.bool()], atol=2e-5, rtol=1e-4)


def test_it_generates_what_sdpa_generates(folder, kernel):
    ids, mask = torch.randint(0, 200, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    varlen, sdpa = (
        load_stock_model(folder, text=name).generate(input_ids=ids, attention_mask=mask, **options)
        for name in ("varlen", "sdpa")
    )
    assert torch.equal(varlen, sdpa) and kernel.segments


def test_a_sliding_window_becomes_the_kernels_window_size():
    window_sizes = []

    def kernel(query, *rest, window_size, **more):
        window_sizes.append(window_size)
        return query

    module, states = SimpleNamespace(is_causal=True), torch.zeros(1, 2, 3, 4)
    segments = _Segments.from_starts(torch.tensor([True, False, False]))
    for options in ({}, {"sliding_window": 8}, {"is_causal": False}):
        out, _ = _varlen_attention(module, states, states, states, segments, kernel=kernel, **options)
        assert out.shape == (1, 3, 2, 4)
    assert window_sizes == [(-1, 0), (7, 0), (-1, -1)]


def test_under_autocast_the_kernel_computes_in_half_precision():
    dtypes = []

    def kernel(query, key, value, *rest, **more):
        dtypes.append({states.dtype for states in (query, key, value)})
        return query

    module, states = SimpleNamespace(is_causal=True), torch.zeros(1, 2, 3, 4)
    segments = _Segments.from_starts(torch.tensor([True, False, False]))
    with torch.autocast("cpu", torch.bfloat16):
        _varlen_attention(module, states, states, states.bfloat16(), segments, kernel=kernel)
    _varlen_attention(module, states, states, states, segments, kernel=kernel)
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


def test_the_real_kernel_has_the_signature_we_call():
    names = list(inspect.signature(attention.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)


# --- the vision tower ---


def random_pixels(grids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor(grids)
    return torch.randn(int(grid.prod(-1).sum()), 1176, generator=torch.Generator().manual_seed(1)), grid


def vision_features(model, grids) -> torch.Tensor:
    values, grid = random_pixels(grids)
    return model.model.visual(values, grid_thw=grid).pooler_output


def vision_loss_and_gradients(model, grids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss on the vision tower's output, and its gradients by parameter."""
    features = vision_features(model, grids)
    loss = (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.model.visual.named_parameters()}


def assert_same(actual, expected) -> None:
    """Losses and gradients equal to a few roundings of float32."""
    assert (actual[0] - expected[0]).abs() <= 1e-6 * expected[0].abs()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= 3e-6 * gradient.norm(), name


LAYOUTS = pytest.mark.parametrize("grids", [GRIDS, [[1, 8, 8]] * 3], ids=["mixed", "alike"])


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@LAYOUTS
def test_parameters_and_vision_features_are_those_of_the_stock_model_bit_by_bit(folder, name, grids):
    stock, ours = load_stock_model(folder, vision=name), load_bbu_model(folder, vision=name)
    expected = stock.state_dict()
    assert list(expected) == list(ours.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    with torch.no_grad():
        assert torch.equal(vision_features(ours, grids), vision_features(stock, grids))


def test_a_model_built_from_a_config_alone_has_the_parameters_of_the_stock_model(folder):
    """Windows are chosen without a draw of random numbers, and so a seed gives the same weights."""
    states = []
    for kind in (load_stock_model(folder), load_bbu_model(folder)):
        torch.manual_seed(0)
        states.append(type(kind)(kind.config).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@LAYOUTS
def test_windows_taken_together_change_neither_loss_nor_gradients(folder, name, grids):
    expected = vision_loss_and_gradients(load_stock_model(folder, vision=name), grids)
    assert_same(vision_loss_and_gradients(load_bbu_model(folder, vision=name), grids), expected)


def test_varlen_sees_the_windows_of_sdpa_all_in_one_call(folder, kernel):
    expected = vision_loss_and_gradients(load_stock_model(folder), GRIDS)
    model = load_bbu_model(folder, vision="varlen")
    assert_same(vision_loss_and_gradients(model, GRIDS), expected)
    assert len(kernel.segments) == model.config.vision_config.depth


def test_varlen_in_the_stock_model_falls_back_to_sdpa_window_by_window(folder, kernel):
    expected = vision_loss_and_gradients(load_stock_model(folder), GRIDS)
    assert_same(vision_loss_and_gradients(load_stock_model(folder, vision="varlen"), GRIDS), expected)
    assert kernel.segments == []


def test_varlen_windows_compute_the_longest_one_where_the_caller_does_not_state_it(folder, kernel):
    block = load_bbu_model(folder, vision="varlen").model.visual.blocks[0].attn
    assert isinstance(block, _VarlenWindows)
    rotary = torch.ones(6, block.head_dim), torch.zeros(6, block.head_dim)
    block(torch.zeros(6, block.dim), torch.tensor([0, 4, 6], dtype=torch.int32), rotary)
    assert kernel.segments == [[4, 2]]


def test_windows_taken_together_work_with_gradient_checkpointing(folder):
    expected = vision_loss_and_gradients(load_stock_model(folder), GRIDS)
    model = load_bbu_model(folder)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(vision_loss_and_gradients(model, GRIDS), expected)


# --- what is safe ---


def pretend_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.fixture
def model(folder):
    return load_bbu_model(folder, for_training=True)


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
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0"):
        check_packing_is_safe(model, "varlen", "sdpa", "packed", autocast_dtype=torch.bfloat16)
    pretend_gpu(monkeypatch, (8, 0))
    check_packing_is_safe(model, "varlen", "varlen", "packed", autocast_dtype=torch.bfloat16)
    check_packing_is_safe(model.to(torch.bfloat16), "varlen", "varlen", "packed")


def test_varlen_is_refused_with_dropout(model, monkeypatch):
    pretend_gpu(monkeypatch, (9, 0))
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="no dropout"):
        check_packing_is_safe(model, "varlen", "sdpa", "packed", autocast_dtype=torch.float16)


def test_segments_end_with_the_last_token():
    starts = pad(torch.zeros(4, dtype=torch.bool), (1, 0), value=True)
    assert segment_lengths(_Segments.from_starts(starts)) == [5]
