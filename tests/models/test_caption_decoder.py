"""What the caption branch can learn, and what it must not: a caption that nothing foretells costs what chance costs."""

from __future__ import annotations

import math

import torch
from torch import nn

from bbu.losses.criterion import caption_sums
from bbu.models.caption_decoder import CaptionDecoder

WORDS, LENGTH, WIDTH = 16, 5, 32


def train(captions_of, steps: int = 250) -> float:
    """Mean token loss over the last fifty of some steps; captions_of(states) gives each step's captions."""
    torch.manual_seed(0)
    decoder = CaptionDecoder(WIDTH, 24, layers=1, heads=4, ffn=64, dropout=0.0, max_length=LENGTH)
    nn.init.normal_(decoder.positions, std=0.02)
    embed, head = nn.Embedding(WORDS, 24), nn.Linear(24, WORDS, bias=False)
    optimizer = torch.optim.AdamW([*decoder.parameters(), *embed.parameters(), *head.parameters()], 3e-3)
    losses = []
    for _ in range(steps):
        states = torch.randn(64, WIDTH)
        captions = captions_of(states)
        total, count = caption_sums(decoder(states, captions, embed), head, captions)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return sum(losses[-50:]) / 50


def test_random_captions_stay_at_chance():
    loss = train(lambda states: torch.randint(0, WORDS, (len(states), LENGTH)))
    assert abs(loss - math.log(WORDS)) < 0.05, loss


def test_captions_that_the_state_foretells_are_learnt():
    """The same set-up learns what can be learnt, so chance above is no accident of a model that learns nothing."""

    def counting(states: torch.Tensor) -> torch.Tensor:
        first = (states[:, :1] > 0).long() * 8
        return (first + torch.arange(LENGTH)) % WORDS

    assert train(counting) < 0.3
