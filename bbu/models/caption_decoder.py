"""The caption branch: a small causal decoder that writes the description of the object that one query predicts.

It uses the language model's vocabulary: token embeddings enter through an adapter, and its states leave through the
language model's head. So a caption can be any text, and no second vocabulary is trained.

Shapes: M captions, C tokens in a caption, D width of the decoder, H width of the language model.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional as F

_Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, each [M, heads, tokens so far, D / heads] (M captions, D width of the decoder)."""


class CaptionDecoder(nn.Module):
    """Predicts token t of a caption from the query's state and tokens 0 to t-1.

    In training all tokens are predicted at once from the true ones before them (teacher forcing); in inference one
    token follows the other, with a cache.
    """

    def __init__(
        self, width: int, language_width: int, *, layers: int, heads: int, ffn: int, dropout: float, max_length: int
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.token_adapter = nn.Linear(language_width, width)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        self.layers = nn.ModuleList(_CaptionLayer(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, language_width)

    def forward(
        self,
        states: Float[torch.Tensor, "M D"],
        tokens: Int64[torch.Tensor, "M C"],
        embed: nn.Module,
    ) -> Float[torch.Tensor, "M C H"]:
        """Compute the states from which the language model's head predicts the C tokens of each caption.

        Args:
            states: state of the query that each caption belongs to.
            tokens: the true captions; ids after the end token may be any, and the last token is not read.
            embed: the language model's token embedding.

        Shapes: M captions, C tokens in a caption, D width of the decoder, H width of the language model.
        """
        # Shift right: the query's state stands before the first token, so position t predicts token t.
        before = self.token_adapter(embed(tokens[:, :-1]).to(states.dtype))
        hidden, _ = self._run(torch.cat([states[:, None], before], dim=1), None)
        return self.output(hidden)

    @torch.no_grad()
    def generate(
        self, states: Float[torch.Tensor, "M D"], embed: nn.Module, language_head: nn.Module, end: int
    ) -> Int64[torch.Tensor, "M C"]:
        """Write captions greedily, each until it ends or has `max_length` tokens.

        Args:
            states: state of the query that each caption belongs to.
            embed: the language model's token embedding.
            language_head: the language model's head.
            end: id of the token that ends a caption.

        Returns:
            The ids, with `end` at and after each caption's end.

        Shapes: M captions, C tokens in the longest caption, D width of the decoder.
        """
        written = torch.full((len(states), self.max_length), end, dtype=torch.int64, device=states.device)
        rows = torch.arange(len(states), device=states.device)
        inputs, cache, length = states[:, None], None, 0
        while len(rows) and length < self.max_length:
            hidden, cache = self._run(inputs, cache)
            token = language_head(self.output(hidden[:, -1])).argmax(-1)
            written[rows, length] = token
            length += 1
            # A caption that has ended leaves the batch: the others cost less.
            going = (token != end).nonzero().flatten()
            if len(going) < len(rows):
                rows, token = rows[going], token[going]
                cache = [(key[going], value[going]) for key, value in cache]
            inputs = self.token_adapter(embed(token[:, None]).to(states.dtype))
        return written[:, :length]

    def _run(self, inputs: torch.Tensor, cache: _Cache | None) -> tuple[torch.Tensor, _Cache]:
        """Run all layers on inputs [M, C, D], which follow the tokens in the cache; return states and the new cache."""
        seen = cache[0][0].shape[2] if cache else 0
        hidden = inputs + self.positions[seen : seen + inputs.shape[1]]
        new_cache: _Cache = []
        for index, layer in enumerate(self.layers):
            hidden, pair = layer(hidden, cache[index] if cache else None)
            new_cache.append(pair)
        return self.norm(hidden), new_cache


class _CaptionLayer(nn.Module):
    """Causal self-attention and a feed-forward block, each with layer normalisation before it."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, width))

    def forward(
        self, hidden: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """hidden, result: [M, C, D]; with a cache C is 1. The new keys and values follow those of the cache."""
        query, key, value = (self._split(part) for part in self.qkv(self.norm_attention(hidden)).chunk(3, dim=-1))
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        # One token with a cache may see all keys; without a cache each token sees itself and those before it.
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=cache is None)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.ffn(self.norm_ffn(hidden)), (key, value)

    def _split(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
