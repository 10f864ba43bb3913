"""From a batch to its losses: what is read of the model inside its forward pass.

Everything here runs within `BBUModel.forward`, so that matching, captions and the language head are seen by
whatever wraps the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from bbu.config.domains import DetectionConfig
from bbu.losses.criterion import SetCriterion, caption_sums, denoising_sums
from bbu.losses.language import find_supervision, language_sums
from bbu.losses.matcher import HungarianMatcher
from bbu.models.denoising import Denoising, disturb
from bbu.models.detection_head import DetectionOutput
from bbu.models.qwen import BBUModel, DetectionQuery
from bbu.schema import IGNORE_INDEX, ROLE_CODES
from bbu.training.loss_manager import LossSum, language_losses

MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "position_ids")
"""What of a batch goes to the model; the rest is for losses and logs."""


class Objective:
    """The losses of a batch, as sums with their counts. The head's are left out where there is no head."""

    def __init__(self, detection: DetectionConfig, logits_chunk_size: int) -> None:
        self._config, self._chunk_size = detection, logits_chunk_size
        self._matcher, self._criterion = HungarianMatcher(detection), SetCriterion(detection)

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, LossSum]:
        """Run the model (wrapped or not) on a batch."""
        supervision = find_supervision(batch["labels"], batch["answer_roles"] == ROLE_CODES["teacher"])
        readers: dict[str, Any] = {
            "read_states": partial(language_sums, supervision=supervision, chunk_size=self._chunk_size)
        }
        if self._config.detection_enabled:
            query = self._query(batch, denoise=model.training)
            readers |= {"detection": query, "read_detection": partial(self._read, batch=batch, query=query)}
        given = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        language, found = model(**given, use_cache=False, **readers)
        return language_losses(language) | (found or {})

    def counts(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What the sums of some batches are divided by: supervised tokens, boxes, caption tokens."""
        counted: dict[str, float] = {"lm_tokens": sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in batches)}
        if self._config.detection_enabled:
            counted["boxes"] = sum(len(boxes) for b in batches for boxes in b["boxes"])
            counted["caption_tokens"] = sum(int((b["caption_ids"] != IGNORE_INDEX).sum()) for b in batches)
        return counted

    def _query(self, batch: Mapping[str, Any], denoise: bool) -> DetectionQuery:
        wanted = self._config.detection_denoising_queries
        noise = disturb(batch["boxes"], wanted, self._config.detection_denoising_noise) if denoise and wanted else None
        return DetectionQuery(batch["student_images"], batch["prompt_ids"], batch["prompt_mask"], noise)

    def _read(
        self, output: DetectionOutput, model: BBUModel, *, batch: Mapping[str, Any], query: DetectionQuery
    ) -> dict[str, LossSum]:
        targets, captions = batch["boxes"], batch["caption_ids"]
        matches = self._matcher(output.boxes, output.logits, output.valid, targets)
        found = self._criterion(output.boxes, output.logits, output.valid, targets, matches)
        losses = {name: LossSum(total, found.boxes) for name, total in found.sums.items()}
        last = matches.last_layer
        states, wanted = output.states[last.sample, last.query], captions[last.target]
        if not len(states):  # run it all the same, for nothing: other ranks may be gathering its weights (ZeRO-3)
            states, wanted = output.states[:1, 0], captions.new_full((1, 1), IGNORE_INDEX)
        losses["caption_loss"] = self._caption_loss(model, states, wanted)
        if query.denoising is not None:
            losses |= self._denoised(output, query.denoising, found.boxes)
        losses["objectness_loss"] = _with_all_parameters(losses["objectness_loss"], model)
        return losses

    def _caption_loss(self, model: BBUModel, states: torch.Tensor, captions: torch.Tensor) -> LossSum:
        """Captions of the matched queries alone, teacher-forced."""
        assert model.detection_head is not None
        tokens = captions.clamp(min=0)  # what follows the end is not read, but must be a token
        logits = model.detection_head.captions(states, tokens, model.get_input_embeddings(), model.lm_head)
        return LossSum(*caption_sums(logits, captions))

    def _denoised(self, output: DetectionOutput, noise: Denoising, boxes: torch.Tensor) -> dict[str, LossSum]:
        """Averaged over the groups: more groups are more practice, not more weight."""
        assert output.denoised_boxes is not None and output.denoised_logits is not None
        sums = denoising_sums(
            output.denoised_boxes, output.denoised_logits, noise.targets, noise.positive, noise.valid,
            alpha=self._config.detection_focal_alpha, gamma=self._config.detection_focal_gamma,
        )  # fmt: skip
        groups = int(noise.group.max()) + 1
        return {name: LossSum(total / groups, boxes) for name, total in sums.items()}


def _with_all_parameters(loss: LossSum, model: BBUModel) -> LossSum:
    """Tie every parameter of the head to the graph by nothing at all.

    A batch without objects writes no caption and denoises nothing; DDP would wait for those gradients for ever.
    ZeRO-3 waits for none, and has cut the parameters up by now.
    """
    if is_deepspeed_zero3_enabled():
        return loss
    assert model.detection_head is not None
    nothing = torch.stack([parameter.sum() for parameter in model.detection_head.parameters()]).sum() * 0
    return LossSum(loss.total + nothing, loss.count)
