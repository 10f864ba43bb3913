"""The losses of a batch through the model's forward pass, with the detection head and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.data.collators import Batch, PackedDataCollator, StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.data.types import Sample
from bbu.models.qwen import BBUModel, load_image_processor, load_model, load_tokenizer
from bbu.training.loss_manager import LossManager, global_counts
from bbu.training.objective import Objective, PlannedCollator
from tests.commands import Demo
from tests.host_waits import host_waits

HEAD = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=32", "detection_num_layers=2",
    "detection_num_heads=4", "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_denoising_queries=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(demo: Demo) -> DirectConfig:
    return load_config("smoke", overrides=[*demo.settings, *HEAD])


@pytest.fixture(scope="module")
def samples(config: DirectConfig) -> list[Sample]:
    """Two training samples."""
    folder = config.model.model_path
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    dataset = load_dataset(config.data, tokenizer, processor, split="train", seed=1, max_length=4096)
    return [dataset[0], dataset[1]]


@pytest.fixture(scope="module")
def batch(samples: list[Sample]) -> Batch:
    return StandardDataCollator(0)(samples)


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


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_of_a_whole_micro_batch_the_matcher_alone_waits_for_the_device(
    config: DirectConfig, samples: list[Sample], model: BBUModel, packed: bool
):
    collate = PackedDataCollator(0, max_total_length=8192, pad_to_multiple_of=64) if packed else StandardDataCollator(0)
    batch = PlannedCollator(collate, model.config.vision_config)(samples)
    objective, losses = Objective(config.detection, 16), LossManager(config.training, config.detection)

    def step() -> None:
        sums = objective.losses(model, batch)
        losses.update(sums)
        losses.objective(sums, counts).backward()

    counts = global_counts(objective.counts([batch]))
    waits = host_waits(step, model, batch, counts, losses._window)
    assert len(waits) == 1 and "matcher.py" in waits[0], "\n".join(waits)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_what_a_loaders_worker_plans_changes_no_loss(
    config: DirectConfig, samples: list[Sample], model: BBUModel, packed: bool
):
    collate = PackedDataCollator(0, max_total_length=8192) if packed else StandardDataCollator(0)
    objective, model = Objective(config.detection, 0), model.eval()
    planned = objective.losses(model, PlannedCollator(collate, model.config.vision_config)(samples))
    for name, loss in objective.losses(model, collate(samples)).items():
        assert torch.equal(planned[name].total, loss.total) and planned[name].count == loss.count


def test_without_a_head_the_language_losses_are_all(demo: Demo, batch: Batch):
    config = load_config("smoke", overrides=demo.settings)
    model = load_model(Path(config.model.model_path), config.model, config.detection)
    objective = Objective(config.detection, config.model.logits_chunk_size)
    assert set(objective.losses(model, batch)) == {"teacher_lm_loss", "student_lm_loss"}
    assert set(objective.counts([batch])) == {"lm_tokens"}
