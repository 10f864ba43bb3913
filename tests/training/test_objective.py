"""The losses of a batch through the model's forward pass, with the detection head and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.data.collators import Batch, StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.models.qwen import BBUModel, load_image_processor, load_model, load_tokenizer
from bbu.training.objective import Objective
from tests.commands import Demo

HEAD = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=32", "detection_num_layers=2",
    "detection_num_heads=4", "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_denoising_queries=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(demo: Demo) -> DirectConfig:
    return load_config("smoke", overrides=[*demo.settings, *HEAD])


@pytest.fixture(scope="module")
def batch(config: DirectConfig) -> Batch:
    """Two padded training samples."""
    folder = config.model.model_path
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    dataset = load_dataset(config.data, tokenizer, processor, split="train", seed=1, max_length=4096)
    return StandardDataCollator(0)([dataset[0], dataset[1]])


@pytest.fixture
def model(config: DirectConfig) -> BBUModel:
    torch.manual_seed(0)
    return load_model(Path(config.model.model_path), config.model, config.detection).train()


def without_objects(batch: Batch) -> dict:
    return {**batch, "boxes": [boxes[:0] for boxes in batch["boxes"]], "caption_ids": batch["caption_ids"][:0]}


def test_each_loss_comes_with_the_count_that_the_objective_divides_by(
    config: DirectConfig, batch: Batch, model: BBUModel
):
    objective = Objective(config.detection, config.model.logits_chunk_size)
    losses, counts = objective.losses(model, batch), objective.counts([batch])
    assert counts["boxes"] == sum(len(boxes) for boxes in batch["boxes"]) > 0
    assert int(losses["bbox_l1_loss"].count) == counts["boxes"]
    assert int(losses["caption_loss"].count) == counts["caption_tokens"]
    assert sum(int(losses[f"{role}_lm_loss"].count) for role in ("teacher", "student")) == counts["lm_tokens"]


def test_a_batch_without_objects_still_gives_every_head_parameter_a_gradient(
    config: DirectConfig, batch: Batch, model: BBUModel
):
    objective = Objective(config.detection, config.model.logits_chunk_size)
    losses = objective.losses(model, without_objects(batch))
    torch.stack([loss.total for loss in losses.values()]).sum().backward()
    assert model.detection_head is not None
    missing = [name for name, p in model.detection_head.named_parameters() if p.grad is None]
    assert not missing and all(torch.isfinite(loss.total) for loss in losses.values())
    assert int(losses["caption_loss"].count) == 0


def test_denoising_queries_belong_to_training_alone(config: DirectConfig, batch: Batch, model: BBUModel):
    objective = Objective(config.detection, config.model.logits_chunk_size)
    assert any("_dn" in name for name in objective.losses(model, batch))
    with torch.no_grad():
        assert not any("_dn" in name for name in objective.losses(model.eval(), batch))


def test_without_a_head_the_language_losses_are_all(demo: Demo, batch: Batch):
    config = load_config("smoke", overrides=demo.settings)
    model = load_model(Path(config.model.model_path), config.model, config.detection)
    objective = Objective(config.detection, config.model.logits_chunk_size)
    assert set(objective.losses(model, batch)) == {"teacher_lm_loss", "student_lm_loss"}
    assert set(objective.counts([batch])) == {"lm_tokens"}
