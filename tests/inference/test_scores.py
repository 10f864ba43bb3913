"""Scores of generated boxes: which tokens are counted, and the mean of their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from bbu.inference.parse import parse_answer
from bbu.inference.scores import ChosenLogProbabilities, _token_ends, object_scores
from bbu.models.tiny import build_tokenizer

TEXT = '[{"bbox_2d": [1, 2, 33, 4], "desc": "机柜空间/满载"}, {"bbox_2d": [5, 6, 7, 88], "desc": "标签贴纸"}]'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["检测所有部件"])


def test_tokens_end_where_their_bytes_do(tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ends = _token_ends(ids, tokenizer)
    assert ends[-1] == len(TEXT.encode())
    for count in range(len(ids)):
        prefix = tokenizer.decode(ids[:count])
        if "\ufffd" not in prefix:  # not inside a character
            assert len(prefix.encode()) == ([0, *ends])[count]


def test_only_coordinate_tokens_of_the_object_count(tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ends = _token_ends(ids, tokenizer)
    first = range(TEXT.index("1, 2, 33"), TEXT.index('], "desc'))  # all ASCII up to here: bytes are characters
    halves = [math.log(0.5) if first.start < end and end - 1 < first.stop else 0.0 for end in ends]
    scores = object_scores(parse_answer(TEXT, finished=True), TEXT, ids, halves, tokenizer)
    assert scores == pytest.approx((0.5, 1.0))


def test_brackets_in_a_description_before_the_box_are_not_the_box(tokenizer: PreTrainedTokenizerBase):
    text = '[{"desc": "a [b] \\"bbox_2d\\": [", "bbox_2d": [1, 2, 3, 4]}]'
    ids = tokenizer.encode(text, add_special_tokens=False)
    inside = range(text.index("1, 2"), text.index("]}]"))
    halves = [
        math.log(0.5) if inside.start < end and end - 1 < inside.stop else 0.0 for end in _token_ends(ids, tokenizer)
    ]
    assert object_scores(parse_answer(text, finished=True), text, ids, halves, tokenizer) == pytest.approx((0.5,))


def test_a_repaired_object_gets_the_mean_of_the_whole_answer(tokenizer: PreTrainedTokenizerBase):
    broken = '[{"bbox_2d": [1, 2, 3, 4], "desc": "a"}, {"bbox_2d": [5, 6, 7, 8] "desc": "b"}]'
    ids = tokenizer.encode(broken, add_special_tokens=False)
    answer = parse_answer(broken, finished=True)
    assert answer.status == "repaired" and answer.spans[1] is None
    scores = object_scores(answer, broken, ids, [math.log(0.25)] * len(ids), tokenizer)
    assert scores == pytest.approx((0.25, 0.25))


def test_the_recorder_keeps_the_log_probability_of_the_greedy_choice():
    recorder = ChosenLogProbabilities()
    scores = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert recorder(torch.zeros(2, 1, dtype=torch.int64), scores) is scores
    assert recorder.rows() == [pytest.approx([math.log(0.75)]), pytest.approx([math.log(0.5)])]
