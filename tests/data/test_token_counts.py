"""Tokens are counted once: by rank 0, and beside the records for the next start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbu.data import token_counts
from bbu.data.dataset import BBUDataset, SampleBuilder, _skip_positions, load_dataset
from bbu.errors import DataError
from tests.data.conftest import view, write_jsonl

Load = Callable[..., BBUDataset]


@pytest.fixture
def load(make_config, tokenizer, processor) -> Load:
    def build(split="train", on_rank_0=token_counts.compute_here, **changes) -> BBUDataset:
        options = {"seed": 1, "max_length": 4096, "on_rank_0": on_rank_0}
        return load_dataset(
            make_config(**{"teacher_ratio": 1.0, **changes}), tokenizer, processor, split=split, **options
        )

    return build


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Few views are worth a file here; the list collects the names of views that are measured."""
    names: list[str] = []
    measure = SampleBuilder.measure_views
    monkeypatch.setattr(token_counts, "_FEWEST", 1)
    monkeypatch.setattr(
        SampleBuilder, "measure_views", lambda self, named: names.extend(n for n, _ in named) or measure(self, named)
    )
    return names


def costs(dataset: BBUDataset) -> list:
    return [dataset.cost(index, epoch) for index in range(len(dataset)) for epoch in range(3)]


def test_a_second_start_counts_nothing(load: Load, measured: list[str]):
    first = costs(load())
    assert len(measured) == 4 + 3
    measured.clear()
    assert costs(load()) == first and not measured


@pytest.mark.parametrize(
    "changes", [{"train_prompt": "concise"}, {"max_pixels": 28 * 28 * 6}, {"max_examples": 3}, {"language": "en"}]
)
def test_counts_of_other_settings_are_not_taken(load: Load, measured: list[str], changes: dict):
    load()
    measured.clear()
    dataset = load(**changes)
    assert measured and costs(dataset)[0].tokens == len(dataset[0])


def test_counts_of_other_records_are_not_taken(load: Load, measured: list[str], data_root: Path):
    load()
    measured.clear()
    write_jsonl(data_root / "train.jsonl", [view("images/s0.jpg", (1, 1, 9, 9))] * 4)
    dataset = load()
    assert len(measured) == 4 and dataset.cost(0, 0).tokens == len(dataset[0])


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"key": 1}', '{"key": "", "tokens": [], "patches": []}', b"\xff\xfe"], ids=repr
)
def test_a_damaged_file_of_counts_is_written_anew(load: Load, measured: list[str], data_root: Path, content):
    path = data_root / "train.token_counts.json"
    first = costs(load())
    whole = path.read_text()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert costs(load()) == first and path.read_text() == whole


def test_counts_of_too_few_views_under_the_right_key_are_not_taken(load: Load, measured: list[str], data_root: Path):
    path = data_root / "train.token_counts.json"
    first = costs(load())
    counts = json.loads(path.read_text())
    path.write_text(json.dumps(counts | {"tokens": counts["tokens"][1:]}))
    assert costs(load()) == first


def test_a_folder_that_cannot_be_written_is_no_error(load: Load, measured: list[str], data_root: Path):
    (data_root / "train.token_counts.json").mkdir()  # root writes into read-only folders too
    assert costs(load()) and len(measured) == 4 + 3
    assert not list(data_root.glob(".train*"))


def test_photos_whose_size_is_not_recorded_are_measured_at_each_start(load: Load, measured: list[str], data_root: Path):
    record = view("images/s0.jpg", (1, 1, 9, 9))
    del record["width"], record["height"]
    write_jsonl(data_root / "train.jsonl", [record])
    load()
    assert not (data_root / "train.token_counts.json").exists()


def test_few_views_leave_no_file(load: Load, data_root: Path):
    load()
    assert not list(data_root.glob("*.token_counts.json"))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_only_rank_0_looks_at_photos_and_counts_tokens(load: Load, measured: list[str], data_root: Path, split: str):
    results = []
    first = costs(load(split, on_rank_0=lambda compute: results.append(compute()) or results[-1]))
    measured.clear()
    for image in (data_root / "images").iterdir():
        image.unlink()  # another rank that looked at one would fail
    assert costs(load(split, on_rank_0=lambda compute: results[0])) == first and not measured


def test_what_rank_0_cannot_use_ends_every_rank(load: Load):
    def another_rank(compute):
        raise DataError("train.jsonl: 1 images are missing")

    with pytest.raises(DataError, match="1 images are missing"):
        load(on_rank_0=another_rank)


@given(st.integers(1, 30), st.sets(st.integers(0, 29)))
def test_teachers_are_numbered_past_the_students_own_photos(positions: int, own: set[int]):
    skipped = sorted(position for position in own if position < positions)
    others = [position for position in range(positions) if position not in own]
    assert [_skip_positions(number, skipped) for number in range(len(others))] == others
