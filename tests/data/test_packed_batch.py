"""A packed row gives each sample what it gets alone, in loss and in every gradient; what leaks is seen to leak."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.errors import DataError
from bbu.losses.language import _cross_entropies, find_supervision
from bbu.models import attention
from bbu.models.qwen import MODEL_INPUTS, load_image_processor, load_tokenizer
from bbu.models.tiny import build_tiny_model
from bbu.schema import IGNORE_INDEX
from tests.data.conftest import view, write_jpeg, write_jsonl
from tests.models.stand_ins import load_bbu_model, load_stock_model, registered_reference_kernel

EQUAL, LEAKING = 1e-5, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def samples(make_config, folder, data_root):
    """Four samples of different lengths and images of different sizes, some with two teachers."""
    sizes = [(112, 84), (196, 140), (84, 252), (140, 140)]
    records = []
    for number, (width, height) in enumerate(sizes):
        name = f"images/s{number}.jpg"
        write_jpeg(data_root / name, width, height, shade=40 * number)
        boxes = [(4 + 9 * i, 10, 40 + 9 * i, 50) for i in range(number)]
        records.append(view(name, *boxes) | {"width": width, "height": height})
    write_jsonl(data_root / "train.jsonl", records)
    config = make_config(teacher_ratio=0.7, num_teacher_samples=2)
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    dataset = load_dataset(config, tokenizer, processor, split="train", seed=3, max_length=4096)
    samples = [dataset[i] for i in range(len(dataset))]
    assert {len(s.images) for s in samples} == {1, 3} and len({len(s) for s in samples}) == 4
    return samples


@pytest.fixture
def kernel():
    with registered_reference_kernel() as kernel:
        yield kernel


def pack(samples, **options):
    return PackedDataCollator(0, **{"max_total_length": 8192, **options})(samples)


def load(folder, text: str):
    """The stock model without a cache."""
    model = load_stock_model(folder, text)
    model.config.use_cache = model.config.text_config.use_cache = False
    return model


def run(model, batch, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [T] of a batch's supervised tokens and their positions [T] in its only row; adds to the gradients."""
    supervision = find_supervision(batch["labels"], batch["answer_roles"] == 1)
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    logits = model(**inputs, **options).logits.flatten(0, 1)[supervision.positions]
    losses = _cross_entropies(logits, supervision.targets)
    losses.sum().backward()
    return losses.detach(), supervision.positions


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def worst_error(model, samples, batch, **options) -> float:
    """The worst relative error of any sample's loss and any parameter's gradient, against one sample at a time."""
    model.zero_grad()
    alone = torch.stack([run(model, StandardDataCollator(0)([s]))[0].sum() for s in samples])
    gradients_alone = gradients(model)
    model.zero_grad()
    losses, positions = run(model, batch, **options)
    ends = batch["sample_lengths"].cumsum(0)
    together = torch.zeros_like(alone).index_add(0, torch.searchsorted(ends, positions, right=True), losses)
    gradients_together = gradients(model)
    errors = [((gradients_together[n] - g).norm() / g.norm()).item() for n, g in gradients_alone.items()]
    return max(*errors, ((together - alone).abs() / alone).max().item())


@pytest.mark.parametrize("multiple", [1, 100])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_packed_equals_separate(folder, samples, name, multiple):
    model = load_bbu_model(folder, name, for_training=True)
    assert worst_error(model, samples, pack(samples, pad_to_multiple_of=multiple)) < EQUAL


def test_sdpa_computes_each_sample_apart_and_without_a_mask(folder, samples, monkeypatch):
    calls, stock = [], attention.sdpa_attention_forward

    def count_tokens(module, query, key, value, mask, **options):
        assert mask is None and query.shape[2] == key.shape[2]
        calls.append(query.shape[2])
        return stock(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", count_tokens)
    model, batch = load_bbu_model(folder, for_training=True), pack(samples, pad_to_multiple_of=100)
    run(model, batch)
    padding = batch["input_ids"].shape[1] - int(batch["sample_lengths"].sum())
    assert calls == [*(len(s) for s in samples), padding] * model.config.text_config.num_hidden_layers


def test_packed_equals_separate_with_varlen_attention_in_both_towers(folder, samples, kernel):
    model = load_bbu_model(folder, "varlen", "varlen", for_training=True)
    assert worst_error(model, samples, pack(samples)) < EQUAL
    assert [len(s) for s in samples] in kernel.segments


def test_packed_with_varlen_equals_separate_with_sdpa(folder, samples, kernel):
    stock, model = load(folder, "sdpa"), load(folder, "varlen")
    for sample in samples:
        run(stock, StandardDataCollator(0)([sample]))
    run(model, pack(samples))
    for name, gradient in gradients(stock).items():
        assert (gradients(model)[name] - gradient).norm() < EQUAL * gradient.norm(), name


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_packed_equals_separate_with_gradient_checkpointing(folder, samples, name):
    model = load_bbu_model(folder, name, for_training=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert worst_error(model, samples, pack(samples)) < EQUAL


# --- what leaks ---


@pytest.mark.parametrize("name", ["sdpa", "eager"])
class TestLeaks:
    def test_positions_left_to_the_model(self, folder, samples, name):
        batch = pack(samples) | {"position_ids": None}
        assert worst_error(load(folder, name), samples, batch) > LEAKING

    def test_positions_of_one_dimension(self, folder, samples, name):
        batch = pack(samples)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        assert worst_error(load(folder, name), samples, batch) > LEAKING

    def test_positions_without_the_row_that_counts(self, folder, samples, name):
        batch = pack(samples)
        batch["position_ids"] = batch["position_ids"][1:]
        assert worst_error(load(folder, name), samples, batch) > LEAKING

    def test_a_mask_of_ones(self, folder, samples, name):
        batch = pack(samples)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert worst_error(load(folder, name), samples, batch) > LEAKING

    def test_a_cache(self, folder, samples, name):
        model = load(folder, name)
        model.config.text_config.use_cache = True  # what Trainer leaves as it is
        assert worst_error(model, samples, pack(samples)) > LEAKING


# --- the row itself ---


def test_the_row_holds_the_samples_and_then_padding(samples):
    batch = pack(samples, pad_to_multiple_of=100)
    lengths = batch["sample_lengths"].tolist()
    total, width = sum(lengths), batch["input_ids"].shape[1]
    assert lengths == [len(s) for s in samples] and width % 100 == 0 and 0 < width - total < 100
    assert "attention_mask" not in batch
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        parts = batch[key][0, :total].split(lengths)
        assert all(torch.equal(part, getattr(s, key)) for part, s in zip(parts, samples, strict=True))
    assert (batch["labels"][0, total:] == IGNORE_INDEX).all()
    assert torch.equal(batch["position_ids"][:, 0, total:], torch.arange(width - total).repeat(4, 1))
    assert (batch["position_ids"][0, 0] == 0).sum() == len(samples) + 1


def test_the_head_is_given_what_the_standard_collator_gives_it(samples):
    packed, standard = pack(samples), StandardDataCollator(0)(samples)
    for key in ("student_images", "prompt_ids", "prompt_mask", "caption_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(packed[key], standard[key]), key
    assert packed["sample_names"] == standard["sample_names"]


def test_a_sample_longer_than_the_row_is_refused_by_name(samples):
    longest = max(samples, key=len)
    with pytest.raises(DataError, match=rf"images/s{samples.index(longest)}\.jpg: {len(longest)} tokens"):
        pack(samples, max_total_length=len(longest) - 1)
    with pytest.raises(DataError, match="tokens in one row"):
        pack(samples, max_total_length=len(longest))


def test_a_supervised_first_token_is_refused(samples):
    wrong = dataclasses.replace(samples[0], labels=samples[0].input_ids)
    with pytest.raises(AssertionError, match="first token is supervised"):
        pack([wrong])
