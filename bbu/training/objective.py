"""From a batch to its losses: what is read of the model inside its forward pass.

Everything here runs within `BBUModel.forward`, so that whatever wraps the model (DDP, ZeRO, autocast) acts on matching,
captions and the language head too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from bbu.config.domains import DetectionConfig
from bbu.losses.criterion import SetCriterion, caption_sums, denoising_sums
from bbu.losses.language import Supervision, find_supervision, language_sums
from bbu.losses.matcher import HungarianMatcher
from bbu.models.denoising import Denoising, draw_denoising_queries
from bbu.models.detection_head import DetectionOutput
from bbu.models.layout import plan_layout
from bbu.models.qwen import MODEL_INPUTS, BBUModel, DetectionQuery
from bbu.schema import IGNORE_INDEX, ROLE_CODES
from bbu.training.loss_manager import LossSum, language_losses


class Objective:
    """Computes the losses of a batch as sums with their counts; without a detection head, the language losses alone.

    Args:
        detection: settings of the head, its matcher and its losses.
        logits_chunk_size: positions of answers, or of captions, whose logits are computed at once; 0 computes all at
            once.
    """

    def __init__(self, detection: DetectionConfig, logits_chunk_size: int) -> None:
        self._config, self._chunk_size = detection, logits_chunk_size
        self._matcher, self._criterion = HungarianMatcher(detection), SetCriterion(detection)

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, LossSum]:
        """Run the model, wrapped or not, on a batch of either collator.

        With a batch of a PlannedCollator the host waits for the device once, to match.
        """
        supervision = batch.get("supervision") or _plan_supervision(batch)
        readers: dict[str, Any] = {
            "read_states": partial(language_sums, supervision=supervision, chunk_size=self._chunk_size)
        }
        if self._config.detection_enabled:
            query = self._head_query(batch, denoise=model.training)
            readers |= {"detection": query, "read_detection": partial(self._head_losses, batch=batch, query=query)}
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        language, head = model(**inputs, layout=batch.get("layout"), **readers)
        return language_losses(language) | (head or {})

    def counts(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Count what the losses of some batches are means over: supervised tokens, boxes, caption tokens."""
        counts: dict[str, float] = {"lm_tokens": sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in batches)}
        if self._config.detection_enabled:
            counts["boxes"] = sum(len(boxes) for b in batches for boxes in b["boxes"])
            counts["caption_tokens"] = sum(int((b["caption_ids"] != IGNORE_INDEX).sum()) for b in batches)
        return counts

    def _head_query(self, batch: Mapping[str, Any], denoise: bool) -> DetectionQuery:
        queries, noisy = self._config.detection_denoising_queries, None
        if denoise and queries:
            noisy = draw_denoising_queries(batch["boxes"], queries, self._config.detection_denoising_noise)
        return DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"], noisy)

    def _head_losses(
        self, output: DetectionOutput, model: BBUModel, *, batch: Mapping[str, Any], query: DetectionQuery
    ) -> dict[str, LossSum]:
        """Match queries to objects, then compute the losses of boxes, objectness, captions and denoising queries."""
        targets = batch["boxes"]
        matches = self._matcher(output.boxes, output.logits, output.valid, targets)
        sums = self._criterion(output.boxes, output.logits, output.valid, targets, matches)
        losses = {name: LossSum(total, sums.boxes) for name, total in sums.sums.items()}
        last = matches.last_layer
        states, captions = output.states[last.sample, last.query], batch["caption_ids"][last.target]
        if not len(states):
            # Nothing matched. Decode one caption without targets all the same: under ZeRO-3 the other ranks may be
            # gathering the caption decoder's weights, and would wait for this rank.
            states, captions = output.states[:1, 0], captions.new_full((1, 1), IGNORE_INDEX)
        losses["caption_loss"] = self._caption_loss(model, states, captions)
        if query.denoising is not None:
            losses |= self._denoising_losses(output, query.denoising, sums.boxes)
        losses["objectness_loss"] = _with_all_parameters(losses["objectness_loss"], model)
        return losses

    def _caption_loss(self, model: BBUModel, states: torch.Tensor, captions: torch.Tensor) -> LossSum:
        """Compute the caption loss of M matched queries, teacher-forced.

        Shapes: states [M, D], D the width of the head; captions [M, T] token ids, IGNORE_INDEX after the end token.
        """
        assert model.detection_head is not None
        tokens = captions.clamp(min=0)  # positions after the end are not read, but must hold a token id
        states = model.detection_head.captions(states, tokens, model.get_input_embeddings())
        return LossSum(*caption_sums(states, model.lm_head, captions, chunk_size=self._chunk_size))

    def _denoising_losses(
        self, output: DetectionOutput, denoising: Denoising, boxes: torch.Tensor
    ) -> dict[str, LossSum]:
        """Average the denoising losses over the groups: more groups give more practice, not more weight."""
        assert output.denoised_boxes is not None and output.denoised_logits is not None
        sums = denoising_sums(
            output.denoised_boxes, output.denoised_logits, denoising.targets, denoising.positive, denoising.valid,
            alpha=self._config.detection_focal_alpha, gamma=self._config.detection_focal_gamma,
        )  # fmt: skip
        return {name: LossSum(total / denoising.groups, boxes) for name, total in sums.items()}


class PlannedCollator:
    """Collates, and computes in the loader's worker what the host would otherwise wait for the device for.

    Args:
        collate: one of the two collators.
        vision_config: the model's.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Mapping[str, Any]], vision_config: Any) -> None:
        self._collate, self._vision_config = collate, vision_config

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = self._collate(samples)
        return {
            **batch, "layout": plan_layout(batch, self._vision_config), "supervision": _plan_supervision(batch),
        }  # fmt: skip


def _plan_supervision(batch: Mapping[str, Any]) -> Supervision:
    """Find the supervised tokens of a batch."""
    return find_supervision(batch["labels"], batch["answer_roles"] == ROLE_CODES["teacher"])


def _with_all_parameters(loss: LossSum, model: BBUModel) -> LossSum:
    """Add zero times every parameter of the head, so that all of them are in the graph.

    A batch without objects decodes no caption and denoises nothing; DDP would wait for those gradients forever.
    ZeRO-3 waits for none, and has partitioned the parameters by now.
    """
    if is_deepspeed_zero3_enabled():
        return loss
    assert model.detection_head is not None
    zero = torch.stack([parameter.sum() for parameter in model.detection_head.parameters()]).sum() * 0
    return LossSum(loss.total + zero, loss.count)
