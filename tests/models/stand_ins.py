"""A varlen kernel for CPUs, and the two models that the attention tests compare: the stock one and ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.read import load_config
from bbu.models import qwen
from bbu.models.attention import register_varlen
from bbu.models.qwen import BBUModel, load_model


class ReferenceKernel:
    """`varlen_attn` in plain sdpa, segment by segment; `segments` holds the lengths of each call's segments."""

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


@contextmanager
def registered_reference_kernel() -> Iterator[ReferenceKernel]:
    """Let `varlen` be a ReferenceKernel inside the block, for models that are loaded inside it too."""
    kernel = ReferenceKernel()
    register_varlen(kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen, "register_varlen", partial(register_varlen, kernel))
        yield kernel
    register_varlen()


def load_stock_model(folder: Path, text: str = "sdpa", vision: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    """transformers' own model with these attention implementations."""
    implementations = {"text_config": text, "vision_config": vision}
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation=implementations)


def load_bbu_model(folder: Path, text: str = "sdpa", vision: str = "sdpa", *, for_training: bool = False) -> BBUModel:
    """This program's model with these attention implementations."""
    overrides = [f"attn_implementation={text}", f"vision_attn_implementation={vision}", "gradient_checkpointing=false"]
    return load_model(folder, load_config("smoke", overrides=overrides).model, for_training=for_training)
