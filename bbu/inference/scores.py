"""A score for each box of a generated answer, from the probabilities of its coordinate tokens."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from bbu.inference.parse import ParsedAnswer

SCORE_SOURCE = "coordinate_probability"
"""What the scores of an answer are, as predictions name it."""
_BOX = re.compile(r'"bbox_2d"\s*:\s*\[')
"""The key of a box, wherever it stands in the object: a description before it may hold brackets too, but a quote in it
is escaped."""


class ChosenLogProbabilities(LogitsProcessor):
    """Records the log-probability of each greedily chosen token.

    Put last among the processors, it sees the scores that the choice is made from. generate()'s own record would keep
    the whole vocabulary for every token.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def rows(self) -> list[list[float]]:
        """Return a list for each answer, with a log-probability for each token."""
        return torch.stack(self.steps, dim=1).tolist()


def object_scores(
    answer: ParsedAnswer,
    text: str,
    ids: Sequence[int],
    log_probabilities: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[float, ...]:
    """Score each object by the geometric mean of the probabilities of its coordinate tokens.

    An object that had to be repaired has no place in the text and gets the mean over the whole answer.

    Args:
        answer: the objects, with their spans in `text`.
        text: the answer.
        ids: the generated tokens that `text` was decoded from.
        log_probabilities: of each generated token; values after the last of `ids` are ignored.
        tokenizer: a byte-level BPE, as Qwen's.
    """
    ends = _token_ends(ids, tokenizer)
    # Tokens are placed in bytes, spans in characters: the bytes before each character.
    offsets = [0, *accumulate(len(character.encode()) for character in text)]
    answer_mean = _geometric_mean(log_probabilities[: len(ends)])
    scores = []
    for span in answer.spans:
        if span is None:
            scores.append(answer_mean)
            continue
        first, last = (offsets[position] for position in _coordinates(text, span[0]))
        # The tokens that end behind the first coordinate's start and begin before the last one's end.
        inside = log_probabilities[bisect_right(ends, first) : bisect_left(ends, last) + 1]
        scores.append(_geometric_mean(inside))
    return tuple(scores)


def _coordinates(text: str, start: int) -> tuple[int, int]:
    """Find the inside of the brackets of a box, in the text of an object that starts at `start`."""
    match = _BOX.search(text, start)
    opening = match.end() if match else text.index("[", start) + 1
    return opening, text.index("]", opening)


def _token_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find where each token ends in the decoded text, in bytes of UTF-8; special tokens take no room.

    A byte-level BPE writes each byte as one character of its vocabulary, so a token is as long as its bytes.
    """
    special = set(tokenizer.all_special_ids)
    ends, position = [], 0
    for number in ids:
        token = "" if number in special else str(tokenizer.convert_ids_to_tokens(int(number)))
        position += len(token)
        ends.append(position)
    return ends


def _geometric_mean(log_probabilities: Sequence[float]) -> float:
    return math.exp(sum(log_probabilities) / len(log_probabilities)) if log_probabilities else 0.0
