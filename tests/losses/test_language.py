"""The language loss depends on the samples, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bbu.losses.language import LanguageSums, find_supervision, language_sums

VOCAB, WIDTH = 50, 16
LENGTHS, ANSWERS = (9, 14, 6, 11), ((2, 4), (3, 8), (1, 2), (4, 9))
"""Four samples: tokens in each, and (start of the teacher's answer, start of the student's)."""


class Toy(nn.Module):
    """Causal by construction (a running mean of embeddings), so right padding cannot reach a real token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)[:, None]
        return self.embed(ids).cumsum(1) / steps


def samples() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    made = []
    generator = torch.Generator().manual_seed(1)
    for length, (teacher, student) in zip(LENGTHS, ANSWERS, strict=True):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels, mask = torch.full_like(ids, -100), torch.zeros(length, dtype=torch.bool)
        labels[teacher : teacher + 1], labels[student:] = ids[teacher : teacher + 1], ids[student:]
        mask[teacher] = True
        made.append((ids, labels, mask))
    return made


def batch(chosen, extra: int = 0):
    width = max(len(ids) for ids, _, _ in chosen) + extra
    fills = (0, -100, False)
    return [torch.stack([pad(row[k], (0, width - len(row[k])), value=fills[k]) for row in chosen]) for k in range(3)]


def sums(model: Toy, chosen, *, extra: int = 0, chunk_size: int = 0) -> LanguageSums:
    ids, labels, mask = batch(chosen, extra)
    return language_sums(model(ids), model.head, find_supervision(labels, mask), chunk_size=chunk_size)


def total_loss(parts: LanguageSums) -> torch.Tensor:
    return parts.teacher_loss + parts.student_loss


def total_tokens(parts: LanguageSums) -> torch.Tensor:
    return parts.teacher_tokens + parts.student_tokens


def accumulate(size: int, extra: int = 0, chunk_size: int = 0) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the four samples in micro-batches of `size`, divided by the global count."""
    model, rows = Toy(), samples()
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    tokens = sum(len(find_supervision(*batch(p)[1:]).positions) for p in parts)
    total = 0.0
    for part in parts:
        part_sums = sums(model, part, extra=extra, chunk_size=chunk_size)
        loss = (0.3 * part_sums.teacher_loss + part_sums.student_loss) / tokens
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_loss_and_gradients_do_not_depend_on_accumulation_padding_or_chunks(size, extra, chunk_size):
    loss, grads = accumulate(4)
    other_loss, other_grads = accumulate(size, extra, chunk_size)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert len(grads) == len(other_grads) == 3
    for one, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_a_mean_of_micro_batch_means_would_depend_on_accumulation():
    model, rows = Toy(), samples()
    whole = sums(model, rows)
    means = [float((total_loss(s) / total_tokens(s)).detach()) for s in (sums(model, [row]) for row in rows)]
    assert abs(sum(means) / 4 - float((total_loss(whole) / total_tokens(whole)).detach())) > 1e-3


def test_teacher_and_student_add_up_to_torchs_own_cross_entropy():
    model, rows = Toy(), samples()
    ids, labels, _ = batch(rows)
    logits = model.head(model(ids))[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    actual = sums(model, rows)
    torch.testing.assert_close(total_loss(actual).double(), expected, rtol=1e-5, atol=1e-5)
    assert actual.teacher_tokens == 4
    assert actual.student_tokens == sum(n - start for n, (_, start) in zip(LENGTHS, ANSWERS, strict=True))
    assert 0 < actual.teacher_loss < total_loss(actual)


def test_a_batch_without_supervision_gives_zero_and_still_has_a_graph():
    model = Toy()
    ids, labels, mask = batch(samples())
    actual = language_sums(model(ids), model.head, find_supervision(torch.full_like(labels, -100), mask))
    total_loss(actual).backward()
    assert total_loss(actual) == 0 and total_tokens(actual) == 0
    assert model.head.weight.grad is not None and not model.head.weight.grad.any()


def test_the_first_token_of_a_sequence_is_never_a_target():
    labels = torch.tensor([[5, 6, 7]])
    supervision = find_supervision(labels, torch.zeros_like(labels, dtype=torch.bool))
    assert supervision.targets.tolist() == [6, 7]
    assert supervision.positions.tolist() == [0, 1]


def test_a_broken_teacher_loss_does_not_reach_the_students_sum():
    supervision = find_supervision(torch.tensor([[-100, 1, 2]]), torch.tensor([[False, True, False]]))
    states = torch.tensor([[[float("nan")] * 4, [0.0] * 4, [0.0] * 4]])
    actual = language_sums(states, nn.Identity(), supervision)
    assert actual.teacher_loss.isnan() and actual.student_loss.isfinite()


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_on_qwen_it_is_the_models_own_loss_times_its_tokens(chunk_size):
    model = qwen()
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    labels[:, :4], labels[0, 8:], mask[:, 4:6] = -100, -100, True
    supervision = find_supervision(labels, mask)
    states = model.model(input_ids=ids).last_hidden_state
    actual = language_sums(states, model.lm_head, supervision, chunk_size=chunk_size)
    torch.testing.assert_close(total_loss(actual) / total_tokens(actual), model(input_ids=ids, labels=labels).loss)


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
