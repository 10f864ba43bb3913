"""The FLOPs we report, compared with those that torch counts while the model runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bbu.config.read import load_config
from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.losses.language import find_supervision, language_sums
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer
from bbu.training.flops import Work, measure_work, training_flops
from tests.commands import Demo


def test_the_count_is_that_of_torch_without_the_half_that_causality_spares(demo: Demo):
    eager = ("attn_implementation=eager", "vision_attn_implementation=eager")
    config = load_config("smoke", overrides=[*demo.settings, *eager])
    folder = Path(config.model.model_path)
    model = load_model(folder, config.model)
    dataset = load_dataset(
        config.data, load_tokenizer(folder), load_image_processor(folder), split="train", seed=0, max_length=4096
    )
    batch = StandardDataCollator(0)([dataset[0]])
    supervision = find_supervision(batch["labels"], batch["answer_roles"] == 1)
    inputs = {
        k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    }
    with FlopCounterMode(display=False) as counter:
        sums, _ = model(**inputs, use_cache=False, read_states=lambda s, head: language_sums(s, head, supervision))
        (sums.teacher_loss + sums.student_loss).backward()
    work, text = measure_work([batch]), model.config.text_config
    spared = 3 * text.num_hidden_layers * 2 * text.hidden_size * work.token_squares
    # the pixels need no gradient: a third of the patch embedding is not computed
    embedding = 2 * work.patches * 1176 * model.config.vision_config.hidden_size
    assert training_flops(model.config, work) + spared - embedding == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_work_adds_up_and_padding_is_no_work():
    batch = {
        "sample_names": ["a", "b"],
        "input_ids": torch.zeros(2, 8, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4]),
        "answer_roles": torch.tensor([[0] * 7 + [2], [0] * 8]),
        "image_grid_thw": torch.tensor([[1, 4, 2], [1, 2, 2]]),
    }
    work = measure_work([batch])
    assert work == Work(2, 12, 16, 80, 1, 12, 80)
    assert measure_work([batch, batch]) == work + work


def test_the_padding_of_a_packed_row_is_no_work():
    batch = {
        "sample_names": ["a", "b"],
        "input_ids": torch.zeros(1, 8, dtype=torch.int64),
        "sample_lengths": torch.tensor([3, 2]),
        "answer_roles": torch.zeros(1, 8, dtype=torch.int64),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    work = measure_work([batch])
    assert (work.tokens, work.computed_tokens, work.token_squares) == (5, 8, 13)
