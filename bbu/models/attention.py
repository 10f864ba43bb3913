"""Attention beside what transformers brings: varlen kernels, the vision tower's windows at once, and what is safe.

Packed samples stay apart only if the attention knows where each begins. transformers 5.23 reads that from row 0 of
four-row position_ids, if there is neither an attention_mask nor a cache: sdpa and eager get a block mask, flash
attention the boundaries, and so does `varlen` here.

Shapes: B rows, S tokens of a row, T = B * S, H heads, G heads of keys and values, D width of a head, N segments,
P patches, C width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from bbu.config.domains import Attention, CollatorType
from bbu.errors import ConfigError

VARLEN = "varlen"
FLASH = "flash_attention_2"
KEEPS_SAMPLES_APART = ("sdpa", "eager", FLASH, VARLEN)
"""Attention of the language model that tells packed samples apart by their position_ids."""
CAUSAL, EVERYTHING = (-1, 0), (-1, -1)
"""Window sizes (left, right) as flash attention counts them; -1 has no limit."""


class VarlenKernel(Protocol):
    """What `torch.nn.attention.varlen.varlen_attn` takes and gives.

    query: [T, H, D]; key, value: [T, G, D]; cu_seq: [N+1] int32; max: the longest segment or more -> [T, H, D].
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
class Segments:
    """Runs of tokens that see only themselves: what varlen attention is given in the place of a mask."""

    bounds: torch.Tensor
    """[N+1] int32, where each begins, and the end of the last"""
    longest: int
    """Tokens of the longest one, or more"""

    @classmethod
    def of(cls, starts: torch.Tensor) -> Segments:
        """starts: [T] bool, True at the first token of each segment."""
        bounds = pad(starts.nonzero().flatten(), (0, 1), value=len(starts)).to(torch.int32)
        return cls(bounds, int(bounds.diff().max()))


# --- varlen ---


def register_varlen(kernel: VarlenKernel = varlen_attn) -> None:
    """Make `varlen` a name of an attention; before the model is loaded. A kernel already registered is replaced."""
    AttentionInterface.register(VARLEN, partial(varlen_attention, kernel=kernel))
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Segments | torch.Tensor | None:
    """Segments instead of a mask, found once for all layers. With a cache, while generating, sdpa's own mask.

    attention_mask: [B, S] bool; a run of padding is a segment of its own.
    """
    if q_length != kv_length:
        return sdpa_mask(
            batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask,
            device=device, **more,
        )  # fmt: skip
    token = torch.arange(1, q_length, device=device)
    row = torch.arange(batch_size, device=device)[:, None]
    # The mask function knows the packed samples. A token that does not see the one before it begins a segment.
    joined = mask_function(row, torch.zeros_like(row), token, token - 1).expand(batch_size, -1)
    if attention_mask is not None:
        joined = joined & (attention_mask[:, 1:] == attention_mask[:, :-1])
    return Segments.of(pad(~joined, (1, 0), value=True).flatten())


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Segments | torch.Tensor | None,
    *,
    kernel: VarlenKernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: [B, H, S, D] and twice [B, G, S, D] -> [B, S, H, D]. Without segments it is sdpa."""
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **more
        )
    assert dropout == 0, "the varlen kernel has no dropout"
    causal = module.is_causal if is_causal is None else is_causal
    window = (sliding_window - 1, 0) if causal and sliding_window else CAUSAL if causal else EVERYTHING
    bounds, longest = attention_mask.bounds, attention_mask.longest
    rows, shared = len(query), query.shape[1] != key.shape[1]
    query, key, value = (_for_kernel(states.transpose(1, 2).flatten(0, 1)) for states in (query, key, value))
    mixed = kernel(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=shared
    )
    return mixed.unflatten(0, (rows, -1)), None


def _for_kernel(states: torch.Tensor) -> torch.Tensor:
    """Under autocast rotary embeddings leave float32 behind, which the kernel does not take."""
    kind = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states


# --- the vision tower's windows ---


LOOPED = ("sdpa", "eager")
"""Implementations that transformers calls once for each window."""


class WindowedAttention(Qwen2_5_VLVisionAttention):
    """The stock attention of the vision tower, which hands all windows of a layer on at once.

    transformers gives only implementations of flash attention all windows; for others it loops over them.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """[P, C] -> [P, C]; cu_seqlens: [N+1] int32, bounds of windows or images."""
        assert position_embeddings is not None
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        return self.proj(self._attend(query, key, value, cu_seqlens, max_seqlen).flatten(1))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int | None
    ) -> torch.Tensor:
        """Three times [P, H, D] -> [P, H, D]."""
        raise NotImplementedError

    def _call(self, *states: torch.Tensor, mask: Segments | None) -> torch.Tensor:
        """The configured attention on three times [B, S, H, D] -> [B, S, H, D]."""
        name: Any = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        heads_first = (part.transpose(1, 2) for part in states)
        return interface(self, *heads_first, attention_mask=mask, scaling=self.scaling, is_causal=False)[0]


class VarlenWindows(WindowedAttention):
    """All windows in one call of the varlen kernel."""

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int | None
    ) -> torch.Tensor:
        segments = Segments(bounds, int(bounds.diff().max()) if longest is None else longest)
        return self._call(query[None], key[None], value[None], mask=segments)[0]


class BatchedWindows(WindowedAttention):
    """Windows of like size in one call; an image has at most four sizes, whatever it measures."""

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int | None
    ) -> torch.Tensor:
        """Patches are sorted by the size of their window before, and put back after."""
        sizes = bounds.diff()
        order = sizes.repeat_interleave(sizes).argsort(stable=True)
        sides, counts = (found.tolist() for found in sizes.unique(return_counts=True))
        shares = [side * count for side, count in zip(sides, counts, strict=True)]
        parts = zip(*(states[order].split(shares) for states in (query, key, value)), strict=True)
        mixed = [
            self._call(*(states.unflatten(0, (-1, side)) for states in part), mask=None).flatten(0, 1)
            for side, part in zip(sides, parts, strict=True)
        ]
        return torch.cat(mixed)[order.argsort()]


def use_varlen_vision(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Give the varlen kernel all windows of a layer in one call; the vision tower must be loaded with `varlen`."""
    _install(model, VarlenWindows)
    model.model.visual.register_forward_pre_hook(_name_longest, with_kwargs=True)


def use_batched_windows(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let `sdpa` or `eager` take windows of like size together instead of one by one; same results."""
    _install(model, BatchedWindows)


def _install(model: Qwen2_5_VLForConditionalGeneration, kind: type[WindowedAttention]) -> None:
    for block in model.model.visual.blocks:
        attention: Any = block.attn
        assert isinstance(attention, Qwen2_5_VLVisionAttention)
        attention.__class__ = kind  # same parameters under the same names, another forward


def _name_longest(visual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the layers their longest segment: each would have to ask the device for it."""
    grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    side = visual.window_size // visual.patch_size
    longest = {"max_seqlen": int(grid[:, 1:].prod(-1).max()), "max_window_seqlen": side * side}
    return args, kwargs | longest


# --- what is safe ---


def check_packing_is_safe(
    model: nn.Module,
    attn_implementation: Attention,
    vision_attn_implementation: Attention,
    collator_type: CollatorType,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Refuse, with a ConfigError that tells all findings, what would mix packed samples or cannot run here.

    model: a Qwen2.5-VL. autocast_dtype: what its layers compute in, None for the dtype of its weights.
    """
    dtype = autocast_dtype or next(model.parameters()).dtype
    findings = _leaks(model, attn_implementation) if collator_type == "packed" else []
    chosen = (("attn_implementation", attn_implementation), ("vision_attn_implementation", vision_attn_implementation))
    for key, name in chosen:
        findings += [f"{key} {name}: {problem}" for problem in _obstacles(name, dtype)]
    config: Any = model.config
    if attn_implementation == VARLEN and config.get_text_config().attention_dropout > 0:
        findings.append(
            "attn_implementation varlen has no dropout; set attention_dropout in config.json to 0 or use sdpa"
        )
    if findings:
        raise ConfigError(*findings)


def _leaks(model: nn.Module, attn_implementation: str) -> list[str]:
    config: Any = model.config
    findings = []
    for where, part in (("config", config), ("text_config", config.get_text_config())):
        if getattr(part, "use_cache", False):
            findings.append(
                f"collator_type packed: use_cache is true in the model's {where}, with which packed samples see each "
                "other; set it to false before training"
            )
    if attn_implementation not in KEEPS_SAMPLES_APART:
        findings.append(
            f"attn_implementation {attn_implementation}: lets packed samples see each other; use one of "
            f"{', '.join(KEEPS_SAMPLES_APART)} or collator_type standard"
        )
    return findings


def _obstacles(name: str, dtype: torch.dtype) -> list[str]:
    """Why an attention cannot run on this machine in this dtype."""
    if name == FLASH and not is_flash_attn_2_available():
        return ["the package flash_attn is not installed or there is no GPU; install it or use varlen or sdpa"]
    if name not in (FLASH, VARLEN):
        return []
    found = []
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        found.append("needs a CUDA device of compute capability 8.0 or more (A100 and newer); use sdpa")
    if dtype not in (torch.bfloat16, torch.float16):
        found.append(f"computes in bfloat16 or float16 only, not {dtype}; set bf16 to true or use sdpa")
    return found
