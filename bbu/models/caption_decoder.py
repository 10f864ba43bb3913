"""The caption branch: a small causal decoder that words what one query has found.

It writes with the language model's own vocabulary: token embeddings come in through an adapter, and its states
go out to the language model's head, so that a caption may be any text and costs no second vocabulary.

Shapes: M captions, C tokens of a caption, D width of the decoder, H width of the language model, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import nn
from torch.nn import functional as F

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [M, heads, seen, D/heads] of each layer."""


class CaptionDecoder(nn.Module):
    """Predicts token t from the query's state and tokens 0..t-1, teacher-forced or one by one with a cache."""

    def __init__(
        self, width: int, language_width: int, *, layers: int, heads: int, ffn: int, dropout: float, max_length: int
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.token_adapter = nn.Linear(language_width, width)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        self.layers = nn.ModuleList(CaptionLayer(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, language_width)

    def forward(
        self,
        states: Float[torch.Tensor, "M D"],
        tokens: Int64[torch.Tensor, "M C"],
        embed: nn.Module,
        language_head: nn.Module,
    ) -> Float[torch.Tensor, "M C V"]:
        """Logits for captions of C tokens.

        states: what the queries know. tokens: any id after the end; the last is not read.
        """
        before = self.token_adapter(embed(tokens[:, :-1]).to(states.dtype))  # the right shift
        hidden, _ = self._run(torch.cat([states[:, None], before], dim=1), None)
        return language_head(self.output(hidden))

    @torch.no_grad()
    def generate(
        self, states: Float[torch.Tensor, "M D"], embed: nn.Module, language_head: nn.Module, end: int
    ) -> tuple[Int64[torch.Tensor, "M C"], Float32[torch.Tensor, " M"]]:
        """Greedy captions: ids with `end` from their end on, and log-probabilities of the texts."""
        inputs, cache, written = states[:, None], None, []
        log_probability = states.new_zeros(len(states), dtype=torch.float32)
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        for _ in range(self.max_length):
            hidden, cache = self._run(inputs, cache)
            scores = language_head(self.output(hidden[:, -1])).float().log_softmax(-1)
            best, token = scores.max(-1)
            token = torch.where(ended, end, token)
            log_probability += torch.where(ended, 0.0, best)
            written.append(token)
            ended = ended | (token == end)
            if bool(ended.all()):
                break
            inputs = self.token_adapter(embed(token[:, None]).to(states.dtype))
        return torch.stack(written, dim=1), log_probability

    def _run(self, inputs: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        seen = cache[0][0].shape[2] if cache else 0
        hidden = inputs + self.positions[seen : seen + inputs.shape[1]]
        kept: Cache = []
        for index, layer in enumerate(self.layers):
            hidden, pair = layer(hidden, cache[index] if cache else None)
            kept.append(pair)
        return self.norm(hidden), kept


class CaptionLayer(nn.Module):
    """Causal self-attention and a feed-forward block, normalised before each."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, width))

    def forward(
        self, hidden: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """[M, C, D] -> [M, C, D]; with a cache C is 1, and the new keys and values join those given."""
        query, key, value = (self._split(part) for part in self.qkv(self.norm_attention(hidden)).chunk(3, dim=-1))
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=cache is None)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.ffn(self.norm_ffn(hidden)), (key, value)

    def _split(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
