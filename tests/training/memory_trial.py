"""Runs one micro-batch of a scaled-down Qwen2.5-VL and measures what it allocates beside weights and gradients."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import Qwen2_5_VLConfig

from bbu.config.flat import DirectConfig
from bbu.data.collators import PackedDataCollator
from bbu.data.types import Sample, Span
from bbu.models.attention import register_varlen
from bbu.models.detection_head import HeadSpec
from bbu.models.qwen import BBUModel
from bbu.run.folder import HEAD_KEY
from bbu.schema import IGNORE_INDEX, BBUObject
from bbu.training.memory import _CAPTION_TOKENS, _OBJECT_TOKENS, _OBJECTS, _PROMPT_TOKENS, Row
from bbu.training.objective import Objective

IMAGE_TOKEN, SIDE = 1, 20
"""Id of the image placeholder; rows and columns of an image in patches."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every tensor that an operator makes, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._count(tensor, before), result)
        return result

    def _count(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._counted or address in before:
            return
        self._counted.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.live -= size


class _SavedByFlash(torch.autograd.Function):
    """Stands in for flash attention, which needs a GPU: it saves the same tensors, and its result means nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = query.clone()
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, key, value, _ = ctx.saved_tensors
        return grads[0].clone(), torch.zeros_like(key), torch.zeros_like(value)


def build_model(config: DirectConfig, sizes: dict[str, Any]) -> BBUModel:
    """A model of these dimensions with the head of the config, as it is trained."""
    register_varlen(lambda query, key, value, *bounds, **options: _SavedByFlash.apply(query, key, value))
    described = Qwen2_5_VLConfig(
        text_config=sizes["text_config"] | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        vision_config=sizes["vision_config"],
        tie_word_embeddings=True,
        image_token_id=IMAGE_TOKEN,
        attn_implementation={"text_config": "varlen", "vision_config": "varlen"},
    )
    head = config.detection if config.detection.detection_enabled else None
    setattr(described, HEAD_KEY, HeadSpec.from_config(head).as_dict() if head else None)
    model = BBUModel(described).train()
    model.config.use_cache = model.config.get_text_config().use_cache = False
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def build_batch(row: Row) -> Any:
    """A packed row that holds what the estimate assumes, with one image in each sample."""
    length, image = row.tokens // row.images, row.patches // row.images // 4
    answer = _OBJECTS * _OBJECT_TOKENS
    samples = []
    for number in range(row.images):
        ids = torch.full((length,), 7)
        ids[1 : 1 + image] = IMAGE_TOKEN
        labels = torch.full((length,), IGNORE_INDEX)
        start = 1 + image + _PROMPT_TOKENS
        labels[start : start + answer] = 7
        samples.append(
            Sample(
                name=str(number),
                input_ids=ids,
                labels=labels,
                mm_token_type_ids=(ids == IMAGE_TOKEN).long(),
                pixel_values=torch.randn(4 * image, 1176),
                image_grid_thw=torch.tensor([[1, SIDE, 4 * image // SIDE]]),
                answers=(Span(start, start + answer, "student"),),
                images=(Span(1, 1 + image, "student"),),
                objects=tuple(BBUObject((10 * i, 10, 10 * i + 9, 40), "x") for i in range(_OBJECTS)),
                captions=((5,) * _CAPTION_TOKENS,) * _OBJECTS,
                image_size=(14 * SIDE, 14 * 4 * image // SIDE),
            )
        )
    return PackedDataCollator(0, max_total_length=row.tokens)(samples)


def measure_pass(config: DirectConfig, sizes: dict[str, Any], row: Row, dtype: torch.dtype, autocast: bool) -> int:
    """The most bytes that a forward and backward pass holds at once beside weights and gradients, its batch included.

    The gradients exist before, so that the pass adds to them. What is measured of them is one piece too much: while
    operators are watched, autograd does not add gradients in place.
    """
    torch.manual_seed(0)
    model, batch = build_model(config, sizes).to(dtype), build_batch(row)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    objective = Objective(config.detection, config.model.logits_chunk_size)
    memory = PeakMemory()
    with memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            losses = objective.losses(model, batch)
        torch.stack([loss.total.float() for loss in losses.values()]).sum().backward()
    inputs = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    return memory.peak + inputs - model.lm_head.weight.nbytes
