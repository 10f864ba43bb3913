"""How sure a generated answer is of each of its boxes: from the probabilities of its coordinate tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from bbu.inference.parse import ParsedAnswer

SCORE_SOURCE = "coordinate_probability"


class ChosenLogProbabilities(LogitsProcessor):
    """Keeps the log-probability of each greedily chosen token; put last, it sees what the choice is made from.

    generate()'s own scores would keep the whole vocabulary for every token.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def rows(self) -> list[list[float]]:
        """One list an answer, a value a token."""
        return torch.stack(self.steps, dim=1).tolist()


def object_scores(
    answer: ParsedAnswer,
    text: str,
    ids: Sequence[int],
    log_probabilities: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[float, ...]:
    """The geometric mean of the probabilities of each object's coordinate tokens.

    ids: the generated tokens that `text` was decoded from. An object that had to be repaired has no place in the
    text and gets the mean of the whole answer.
    """
    ends = token_ends(ids, tokenizer)
    whole = _mean(log_probabilities[: len(ends)])
    scores = []
    for span in answer.spans:
        if span is None:
            scores.append(whole)
            continue
        opening = text.index("[", span[0])
        closing = text.index("]", opening)
        first, last = (len(text[:position].encode()) for position in (opening + 1, closing))
        starts = [0, *ends[:-1]]
        inside = [p for p, a, b in zip(log_probabilities, starts, ends, strict=False) if a < last and b > first]
        scores.append(_mean(inside))
    return tuple(scores)


def token_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where each token ends in the decoded text, in bytes of UTF-8; special tokens take no room.

    A byte-level BPE writes each byte as one character of its vocabulary, so a token's length is its bytes.
    """
    special = set(tokenizer.all_special_ids)
    ends, position = [], 0
    for number in ids:
        token = "" if number in special else str(tokenizer.convert_ids_to_tokens(int(number)))
        position += len(token)
        ends.append(position)
    return ends


def _mean(log_probabilities: Sequence[float]) -> float:
    return math.exp(sum(log_probabilities) / len(log_probabilities)) if log_probabilities else 0.0
