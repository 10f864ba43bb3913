"""Attention that transformers does not bring: packed samples one by one under sdpa, the varlen kernel, all vision
windows in one call, and a safety check.

Samples packed into one row stay apart only if the attention knows where each one begins. transformers 5.23 reads this
from row 0 of position_ids with four rows, provided that there is neither an attention_mask nor a cache. From it, eager
gets a block mask, and flash attention the bounds of the samples; so do `varlen` and `sdpa` here. With the stock block
mask, sdpa would compute the scores of all pairs of samples, in its slow kernels.

Shapes: B rows, S tokens in a row, T = B * S tokens, H heads, G heads of keys and values, D width of a head,
N segments, P patches, C width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from bbu.config.domains import Attention, CollatorType
from bbu.errors import ConfigError
from bbu.models.layout import Groups, TextLayout, plan_vision

VARLEN = "varlen"
"""The name under which the varlen kernel is registered, and the value of attn_implementation that selects it."""
_SDPA = "sdpa"
_SDPA_BY_SAMPLE = "sdpa_by_sample"
"""The name under which sdpa of packed samples is registered; `sdpa` in the run config selects it."""
_FLASH = "flash_attention_2"
_LOOPED = ("sdpa", "eager")
"""Implementations that the stock vision attention calls once for each window."""
_KEEPS_SAMPLES_APART = ("sdpa", "eager", _FLASH, VARLEN)
"""Implementations that keep packed samples of the language model apart by their position_ids."""
_CAUSAL, _EVERYTHING = (-1, 0), (-1, -1)
"""Window sizes (left, right) in tokens, as flash attention counts them; -1 sets no limit."""


class _VarlenKernel(Protocol):
    """The signature of `torch.nn.attention.varlen.varlen_attn`.

    Shapes:
        query: [T, H, D]
        key, value: [T, G, D]
        cu_seq_q, cu_seq_k: [N+1] int32, cumulative lengths of the segments
        result: [T, H, D]
        (T tokens, H heads, G heads of keys and values, D width of a head, N segments)
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Any: ...


@dataclass(frozen=True)
class _Segments:
    """Runs of tokens that see only themselves; the varlen kernel takes them in place of a mask."""

    bounds: torch.Tensor
    """[N+1] int32: the first token of each of N segments, then the end of the last segment."""
    longest: int
    """Length of the longest segment in tokens, or an upper bound of it."""
    lengths: tuple[int, ...] = ()
    """Lengths of the N segments in tokens; the varlen kernel does not need them."""

    @classmethod
    def from_starts(cls, starts: torch.Tensor) -> _Segments:
        """starts: [T] bool, True at the first token of each segment (T tokens)."""
        bounds = pad(starts.nonzero().flatten(), (0, 1), value=len(starts)).to(torch.int32)
        lengths = tuple(bounds.diff().tolist())
        return cls(bounds, max(lengths), lengths)


def _segments_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    *,
    find_segments: Callable[..., _Segments | None],
    **more: Any,
) -> _Segments | torch.Tensor | None:
    """Return the segments of a batch in place of a mask; transformers calls this once for all layers.

    Args:
        mask_function: transformers' rule (batch, head, query index, key index) -> bool: may the query see the key?
        attention_mask: [B, S] bool, True at real tokens (B rows, S tokens); None where no token is padding.
        find_segments: is given B, S, the rule, the mask, the device and the size of a sliding window, if there is one;
            returns None where the stock mask of sdpa is wanted.
    """
    # With a cache, while generating, there are more keys than queries; segments do not describe that.
    if q_length == kv_length:
        window = more.get("local_size")
        segments = find_segments(batch_size, q_length, mask_function, attention_mask, device, window)
        if segments is not None:
            return segments
    return sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, device=device,
        **more,
    )  # fmt: skip


# --- sdpa ---


def register_text_attention(name: Attention) -> str:
    """Let packed rows under sdpa be computed sample by sample. Call it before the model is loaded.

    Args:
        name: the run config's attn_implementation.

    Returns:
        The name to load the language model with.
    """
    if name != _SDPA:
        return name
    AttentionInterface.register(_SDPA_BY_SAMPLE, _attend_by_sample)
    AttentionMaskInterface.register(_SDPA_BY_SAMPLE, partial(_segments_or_mask, find_segments=_packed_samples))
    return _SDPA_BY_SAMPLE


def _packed_samples(
    rows: int,
    tokens: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
    window: int | None,
) -> _Segments | None:
    """Find the samples of a packed row; None for anything else."""
    # transformers replaces the plain causal rule where positions begin anew.
    is_packed = rows == 1 and attention_mask is None and mask_function is not causal_mask_function and window is None
    if not is_packed:
        return None
    return _Segments.from_starts(_find_starts(rows, tokens, mask_function, device).flatten())


def _attend_by_sample(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Segments | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each sample of a packed row; without segments it is the stock sdpa.

    Shapes:
        query: [B, H, S, D]
        key, value: [B, G, S, D]
        result: [B, S, H, D], and None in place of attention weights
        (B rows, H heads, G heads of keys and values, S tokens in a row, D width of a head)
    """
    if not isinstance(attention_mask, _Segments):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    samples = zip(*(states.split(attention_mask.lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in samples], dim=1), None


def _find_starts(rows: int, tokens: int, mask_function: Callable[..., Any], device: torch.device | str) -> torch.Tensor:
    """[B, S] bool: True at the first token of each sample, in B rows of S tokens.

    The mask function knows where packed samples begin: a token that may not see its predecessor is the first of its
    sample. The rule is the same for every head, so head 0 stands for all.
    """
    token = torch.arange(1, tokens, device=device)
    row = torch.arange(rows, device=device)[:, None]
    joined = mask_function(row, torch.zeros_like(row), token, token - 1).expand(rows, -1)
    return pad(~joined, (1, 0), value=True)


# --- varlen ---


def register_varlen(kernel: _VarlenKernel = varlen_attn) -> None:
    """Register `varlen` as an attention implementation of transformers. Call it before the model is loaded.

    Args:
        kernel: computes the attention; it replaces a kernel that is registered already.
    """
    AttentionInterface.register(VARLEN, partial(_varlen_attention, kernel=kernel))
    AttentionMaskInterface.register(VARLEN, partial(_segments_or_mask, find_segments=_all_segments))


def _all_segments(
    rows: int,
    tokens: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
    window: int | None,
) -> _Segments:
    """Find the segments of a batch, its rows laid end to end, as the kernel wants them."""
    starts = _find_starts(rows, tokens, mask_function, device)
    # A change between real tokens and padding starts a segment too, so that real tokens never see padding.
    if attention_mask is not None:
        starts = starts | pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    return _Segments.from_starts(starts.flatten())


def _varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Segments | torch.Tensor | None,
    *,
    kernel: _VarlenKernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the varlen kernel; without segments (while generating) it is sdpa.

    Shapes:
        query: [B, H, S, D]
        key, value: [B, G, S, D]
        result: [B, S, H, D], and None in place of attention weights
        (B rows, H heads, G heads of keys and values, S tokens in a row, D width of a head)
    """
    if not isinstance(attention_mask, _Segments):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **more
        )
    assert dropout == 0, "the varlen kernel has no dropout"
    causal = module.is_causal if is_causal is None else is_causal
    # transformers counts the token itself into the sliding window, the kernel counts the tokens to its left only.
    window = (sliding_window - 1, 0) if causal and sliding_window else _CAUSAL if causal else _EVERYTHING
    bounds, longest = attention_mask.bounds, attention_mask.longest
    rows, grouped = len(query), query.shape[1] != key.shape[1]
    query, key, value = (_in_autocast_dtype(states.transpose(1, 2).flatten(0, 1)) for states in (query, key, value))
    mixed = kernel(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
    return mixed.unflatten(0, (rows, -1)), None


def _in_autocast_dtype(states: torch.Tensor) -> torch.Tensor:
    """Cast to autocast's dtype: rotary embeddings leave float32 behind, which the kernel does not take."""
    kind = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states


# --- what the language model is told ---


def text_options(config: Any, text: TextLayout, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    """Say to the language model what each token may see, without a wait for the device.

    Args:
        config: the language model's.
        text: where the samples lie.
        attention_mask: [B, S], of rows that are padded on the right; None for a packed row.

    Returns:
        Keyword arguments of the language model.
    """
    name = config._attn_implementation
    if name not in (_SDPA_BY_SAMPLE, _FLASH, VARLEN) or "sliding_attention" in config.layer_types:
        return {"attention_mask": attention_mask}  # transformers computes a mask
    if not text["lengths"]:
        # A real token never sees padding that stands behind it: the rows need no mask but the causal one.
        return {"attention_mask": {"full_attention": None}}
    longest = max(text["lengths"])
    if name != _FLASH:
        return {"attention_mask": {"full_attention": _Segments(text["bounds"], longest, text["lengths"])}}
    bounds = {"cu_seq_lens_q": text["bounds"], "cu_seq_lens_k": text["bounds"]}
    return {"attention_mask": {"full_attention": None}, "max_length_q": longest, "max_length_k": longest, **bounds}


# --- the vision tower's windows ---


def use_windowed_attention(visual: Qwen2_5_VisionTransformerPretrainedModel) -> None:
    """Let each layer of a new vision tower attend to all its windows at once. Call it before weights are loaded.

    Most layers of Qwen2.5-VL's vision tower attend within windows of 112 pixels (arXiv:2502.13923, section 2.1.1).
    The stock attention hands all windows of a layer to flash attention, but calls every other implementation once for
    each window. Names and values of the parameters stay the same, and so do the results.

    Args:
        visual: a vision tower whose `config` names its attention implementation.
    """
    visual.register_forward_pre_hook(_add_layout, with_kwargs=True)
    name = visual.config._attn_implementation
    if name not in (VARLEN, *_LOOPED):
        return
    attention = _VarlenWindows if name == VARLEN else _BatchedWindows
    for number, block in enumerate(visual.blocks):
        stock: Any = block.attn
        block.attn = attention(stock, sees_whole_images=number in visual.fullatt_block_indexes)


def _add_layout(visual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Compute the layout of the images at once where the caller has not; the host then waits for the device once."""
    if "window_index" not in kwargs:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        layout = send_to_device(plan_vision(grid.cpu(), visual.config), grid.device, non_blocking=True)
        kwargs = kwargs | layout
    if visual.config._attn_implementation not in _LOOPED:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("windows", "images")}
    return args, kwargs


class _WindowedAttention(Qwen2_5_VLVisionAttention):
    """The stock attention of the vision tower, with one call for all windows of a layer."""

    def __init__(self, stock: Qwen2_5_VLVisionAttention, *, sees_whole_images: bool) -> None:
        """stock: the attention to replace, whose parameters this one takes over."""
        super().__init__(stock.config)
        self.qkv, self.proj, self.sees_whole_images = stock.qkv, stock.proj, sees_whole_images

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        windows: Groups | None = None,
        images: Groups | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Attend within each window, or within each image in the layers with full attention.

        Shapes:
            hidden_states, result: [P, C]
            cu_seqlens: [N+1] int32, bounds of the windows or images in patches
            (P patches, C width of the vision tower, N windows or images)
        """
        assert position_embeddings is not None
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        groups = images if self.sees_whole_images else windows
        return self.proj(self._attend(query, key, value, cu_seqlens, max_seqlen, groups).flatten(1))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int | None,
        groups: Groups | None,
    ) -> torch.Tensor:
        """query, key, value, result: [P, H, D]; bounds: [N+1] (P patches, H heads, D width of a head, N windows)."""
        raise NotImplementedError

    def _call(self, *states: torch.Tensor, mask: _Segments | None) -> torch.Tensor:
        """Call the configured attention. states (query, key, value) and result: [B, S, H, D] (B windows, S patches)."""
        name: Any = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        heads_first = (part.transpose(1, 2) for part in states)
        return interface(self, *heads_first, attention_mask=mask, scaling=self.scaling, is_causal=False)[0]


class _VarlenWindows(_WindowedAttention):
    """All windows in one call of the varlen kernel."""

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int | None,
        groups: Groups | None,
    ) -> torch.Tensor:
        segments = _Segments(bounds, int(bounds.diff().max()) if longest is None else longest)
        return self._call(query[None], key[None], value[None], mask=segments)[0]


class _BatchedWindows(_WindowedAttention):
    """Windows of equal size in one call of sdpa or eager.

    Windows have at most four sizes in one image: inner ones, those at the right edge, those at the bottom edge, and
    the one in the corner.
    """

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int | None,
        groups: Groups | None,
    ) -> torch.Tensor:
        assert groups is not None, "the vision tower passes the groups of its windows"
        patches = [length * count for length, count in zip(groups["lengths"], groups["counts"], strict=True)]
        # One call for each size, with the windows as the batch.
        parts = zip(*(states[groups["order"]].split(patches) for states in (query, key, value)), strict=True)
        mixed = [
            self._call(*(states.unflatten(0, (-1, length)) for states in part), mask=None).flatten(0, 1)
            for length, part in zip(groups["lengths"], parts, strict=True)
        ]
        return torch.cat(mixed)[groups["restore"]]


# --- what is safe ---


def check_packing_is_safe(
    model: nn.Module,
    attn_implementation: Attention,
    vision_attn_implementation: Attention,
    collator_type: CollatorType,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Refuse an attention that would mix packed samples, or that cannot run on this machine.

    Args:
        model: a Qwen2.5-VL.
        attn_implementation: attention of the language model.
        vision_attn_implementation: attention of the vision tower.
        collator_type: packed or standard.
        autocast_dtype: what the layers compute in; None for the dtype of the weights.

    Raises:
        ConfigError: lists all findings at once.
    """
    dtype = autocast_dtype or next(model.parameters()).dtype
    findings = _packing_leaks(model, attn_implementation) if collator_type == "packed" else []
    keys = (("attn_implementation", attn_implementation), ("vision_attn_implementation", vision_attn_implementation))
    for key, name in keys:
        findings += [f"{key} {name}: {problem}" for problem in _obstacles(name, dtype)]
    config: Any = model.config
    if attn_implementation == VARLEN and config.get_text_config().attention_dropout > 0:
        findings.append(
            "attn_implementation varlen has no dropout; set attention_dropout in config.json to 0 or use sdpa"
        )
    if findings:
        raise ConfigError(*findings)


def check_attention_is_available(implementations: Mapping[str, Attention]) -> None:
    """Refuse an attention that needs a package or a GPU which this machine lacks.

    Args:
        implementations: config key → its value.

    Raises:
        ConfigError: names each key to change.
    """
    findings = [
        f"{key} {name}: {problem} (--set {key}=sdpa)"
        for key, name in implementations.items()
        for problem in _missing_parts(name)
    ]
    if findings:
        raise ConfigError(*findings)


def _packing_leaks(model: nn.Module, attn_implementation: str) -> list[str]:
    """Why packed samples would see each other."""
    config: Any = model.config
    findings = []
    for where, part in (("config", config), ("text_config", config.get_text_config())):
        if getattr(part, "use_cache", False):
            findings.append(
                f"collator_type packed: use_cache is true in the model's {where}, with which packed samples see each "
                "other; set it to false before training"
            )
    if attn_implementation not in _KEEPS_SAMPLES_APART:
        findings.append(
            f"attn_implementation {attn_implementation}: lets packed samples see each other; use one of "
            f"{', '.join(_KEEPS_SAMPLES_APART)} or collator_type standard"
        )
    return findings


def _obstacles(name: str, dtype: torch.dtype) -> list[str]:
    """Why an attention cannot run on this machine in this dtype."""
    findings = _missing_parts(name)
    if name not in (_FLASH, VARLEN) or (findings and name == _FLASH):
        return findings
    if dtype not in (torch.bfloat16, torch.float16):
        findings.append(f"computes in bfloat16 or float16 only, not {dtype}; set bf16 to true or use sdpa")
    return findings


def _missing_parts(name: str) -> list[str]:
    """What an attention needs and this machine lacks."""
    if name == _FLASH and not is_flash_attn_2_available():
        return ["the package flash_attn is not installed or there is no GPU; install it or use varlen or sdpa"]
    if name in (_FLASH, VARLEN) and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)):
        return ["needs a CUDA device of compute capability 8.0 or more (A100 and newer); use sdpa"]
    return []
