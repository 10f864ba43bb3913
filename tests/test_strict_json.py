"""JSON from anywhere: a value or one typed error, never a hang, a RecursionError or a number that is none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bbu.errors import BBUError, CheckpointError
from bbu.evaluation.pending import sources_of
from bbu.jobs.records import read_records
from bbu.run.checkpoints import Manifest
from bbu.run.folder import RunFolder
from bbu.run.lease import Owner, take_run_lease
from bbu.run.ledger import Ledger
from bbu.run.provenance import record_start
from bbu.run.status import read_status
from bbu.strict_json import JsonError, build_dataclass, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ('{"a": 1', "line 1, column 8"),
        ("{} {}", "not JSON"),
        ("NaN", "NaN is not a JSON number"),
        ('[{"a": -Infinity}]', "-Infinity is not a JSON number"),
        ("1e999", "the number 1e999 is too large"),
        ("[" + "9" * 401 + "]", "a number of 401 digits"),
        ("-" + "9" * 5000, "a number of 5001 digits"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        ('{"a": ["\\ud83d"]}', "half of a surrogate pair"),
        ('{"\\uDE00": 1}', "half of a surrogate pair"),
        ('"\ud83d"', "half of a surrogate pair"),
        ('"ä"'.encode("utf-16"), "not UTF-8"),
        ('"螺丝"'.encode("gbk"), "not UTF-8"),
    ],
)
def test_a_text_that_is_no_usable_json_is_one_typed_error(text: str | bytes, reason: str):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 64 + "]" * 64, None),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('"\\ud83d\\ude00"', "😀"),
        ("9" * 300, int("9" * 300)),
        ("[1.5e300, -0, 1e-999]", [1.5e300, 0, 0.0]),
    ],
)
def test_unusual_json_within_the_bounds_is_read(text: str | bytes, value: object):
    parsed = parse_json(text)
    assert value is None or parsed == value


def test_half_of_a_surrogate_pair_is_read_where_it_is_allowed():
    assert parse_json('"\\ud83d"', allow_surrogates=True) == "\ud83d"


def test_a_file_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("[" * 5000)
    with pytest.raises(CheckpointError, match=r"a\.json: nested deeper than 64 levels; remove it"):
        read_json(path, CheckpointError, "remove it")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path, CheckpointError, "remove it")
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_json(path, CheckpointError, "remove it")


@dataclass(frozen=True)
class Part:
    """A nested dataclass."""

    folder: Path
    """A text in JSON."""


@dataclass(frozen=True)
class Whole:
    """One field of each kind."""

    count: int
    """A whole number."""
    seconds: float | None
    """A number or null."""
    names: tuple[tuple[str, ...], ...] = ()
    """A list of lists in JSON."""
    parts: Mapping[str, Part] | None = None
    """Objects by name."""


def test_a_dataclass_comes_back_from_its_json():
    data = {"count": 1, "seconds": 2, "names": [["a", "b"], []], "parts": {"x": {"folder": "y"}}}
    expected = Whole(1, 2, (("a", "b"), ()), {"x": Part(Path("y"))})
    assert build_dataclass(Whole, data) == expected
    assert build_dataclass(Whole, {"count": 1, "seconds": None}) == Whole(1, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": True}, "count must be int, not True"),
        ({"count": 1.0}, "count must be int"),
        ({"count": None}, "count must be int"),
        ({"seconds": "1"}, "seconds must be float"),
        ({"names": ["ab"]}, "names must be"),
        ({"parts": {"x": {}}}, "Part lacks the field, or does not know it: 'folder'"),
        ({"parts": {"x": []}}, "Part must be an object"),
        ({"colour": 1}, "'colour'"),
        ({"count": [[]] * 5000}, "…"),
    ],
)
def test_a_field_of_another_type_is_named(change: dict[str, Any], reason: str):
    with pytest.raises(JsonError) as caught:
        build_dataclass(Whole, {"count": 1, "seconds": 2.0} | change)
    assert reason in str(caught.value) and len(str(caught.value)) < 200


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_lease(root: Path, text: str) -> None:
    write(root / ".lease/1", text)
    take_run_lease(RunFolder(root), Owner.of_this_process({}), 900.0)


def read_result(root: Path, text: str) -> None:
    write(root / "results/a.json", text)
    Ledger(root).result("a")


READERS: dict[str, Callable[[Path, str], object]] = {
    "manifest": lambda root, text: Manifest.load(write(root / "MANIFEST.json", text).parent),
    "model config": lambda root, text: sources_of(write(root / "config.json", text).parent),
    "status": lambda root, text: read_status(RunFolder(write(root / "status.json", text).parent)),
    "job records": lambda root, text: read_records(RunFolder(write(root / "jobs.jsonl", text).parent)),
    "provenance": lambda root, text: record_start(RunFolder(write(root / "provenance.json", text).parent), {}, ()),
    "lease": read_lease,
    "result": read_result,
}
HOSTILE = {
    "no JSON": "{",
    "deep list": '{"a": ' + "[" * 100_000,
    "deep object": '{"a":' * 900 + "1" + "}" * 900,
    "huge integer": '{"step": ' + "9" * 5000 + "}",
    "NaN": '{"step": NaN}',
    "half a pair": '{"host": "\\ud83d"}',
    "a list": "[1]",
    "a number": "1",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_each_reader_of_a_run_folder_names_the_file_that_is_damaged(
    tmp_path: Path, read: Callable[[Path, str], object], text: str
):
    with pytest.raises(BBUError) as caught:
        read(tmp_path, text)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_claim_is_passed_over_with_a_warning(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture):
    ledger = Ledger(tmp_path)
    write(tmp_path / "claims/a.1", text)
    assert ledger.held() == [] and "claims/a.1" in caplog.text


def test_a_status_or_record_with_a_value_of_another_type_is_damaged(tmp_path: Path):
    for value in ("x", [1], {}, True):
        write(tmp_path / "status.json", json.dumps({"step": value}))
        with pytest.raises(CheckpointError, match=r"status\.json: step must be int"):
            read_status(RunFolder(tmp_path))


def test_a_line_separator_inside_a_record_does_not_split_it(tmp_path: Path):
    record = {"name": "train", "ids": [], "element": None, "runs": [], "folders": [], "cluster": "local",
              "cwd": "/a\u2028b\x85c", "submitted": 1.0}  # fmt: skip
    write(tmp_path / "jobs.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
    assert read_records(RunFolder(tmp_path))[0].cwd == "/a\u2028b\x85c"
