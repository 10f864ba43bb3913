"""Every reader on hostile input: a result or a typed error, within time and memory. `-m tests.fuzz` tries more."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.readers import Reader, readers
from tests.fuzz.trial import try_reader

RECORDS = 24
"""Inputs for a reader that costs little."""


def name_of(reader: Reader) -> str:
    return reader.name


@pytest.mark.parametrize("reader", readers(), ids=name_of)
def test_hostile_input_ends_in_a_result_or_a_typed_error_within_time_and_memory(reader: Reader):
    tally = try_reader(reader, max(4, RECORDS // reader.cost), seed=7)
    assert tally.examples == []
    assert tally.records == tally.accepted + tally.refused and tally.slowest < 5


@pytest.mark.parametrize("reader", readers(), ids=name_of)
def test_equal_seeds_make_equal_input(reader: Reader):
    assert reader.make(random.Random("a")) == reader.make(random.Random("a")) != reader.make(random.Random("b"))
