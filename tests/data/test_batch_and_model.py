"""A batch goes into a real (tiny) model as it is, and padding changes nothing."""

import pytest
import torch

from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.models.qwen import MODEL_INPUTS, load_image_processor, load_tokenizer
from bbu.models.tiny import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def model(folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def samples(make_config, folder):
    config = make_config(teacher_ratio=0.7)
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    dataset = load_dataset(config, tokenizer, processor, split="train", seed=3, max_length=4096)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len({len(s) for s in samples}) > 1, "the draw must mix samples with and without a teacher"
    return samples


@torch.no_grad()
def logits(model, batch):
    return model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_sample_the_logits_it_has_alone(model, samples, side):
    batch = StandardDataCollator(0, pad_to_multiple_of=8, side=side)(samples)
    together = logits(model, batch)
    for row, sample in enumerate(samples):
        alone = logits(model, StandardDataCollator(0)([sample]))[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], alone, atol=2e-5, rtol=1e-4)


def test_image_positions_are_three_dimensional_only_with_token_types(model, samples):
    batch = StandardDataCollator(0)(samples[:1])
    with_types = logits(model, batch)
    model.model.rope_deltas = None
    batch["mm_token_type_ids"] = batch["position_ids"] = None  # what silently falls back to 1-D positions
    assert not torch.allclose(with_types, logits(model, batch), atol=1e-3)


def test_position_ids_of_an_image_span_rows_and_columns(model, samples):
    batch = StandardDataCollator(0)(samples[:1])
    args = (batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"])
    positions, _ = model.model.get_rope_index(*args)
    placeholders = batch["mm_token_type_ids"][0].bool().nonzero().flatten()
    image = positions[:, 0, placeholders[-12:]]
    assert [len(axis.unique()) for axis in image] == [1, 3, 4]
