"""Where results come from: what is recorded of a start, and what the hashes of code cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbu.run.folder import RunFolder
from bbu.run.provenance import code_hash, computing_code_hash, file_hash, record_start


def test_every_start_adds_an_entry_and_changes_none(tmp_path: Path):
    run, data = RunFolder.of(tmp_path, "demo").create(), tmp_path / "val.jsonl"
    data.write_text("{}\n")
    run.provenance.write_text(json.dumps({"starts": [{"started": "long ago", "mood": "good"}]}))
    record_start(run, {"BBU_COMMIT": "c0ffee", "SLURM_JOB_ID": "7", "HOME": "/"}, [data])
    old, new = json.loads(run.provenance.read_text())["starts"]
    assert old == {"started": "long ago", "mood": "good"}
    assert (new["commit"], new["image_sha256"], new["job"]["SLURM_JOB_ID"]) == ("c0ffee", None, "7")
    assert new["data_sha256"] == {"val.jsonl": file_hash(data)} and new["code_sha256"] == code_hash()
    assert sorted(new) == [
        "code_sha256", "commit", "data_sha256", "image_sha256", "job", "packages", "started",
    ]  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name in ("boxes.py", "data/sample.py", "jobs/sweep.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"""Words."""\n\n\ndef area(side: int) -> int:\n    return side * side\n')
    return tmp_path


PARTS = ("boxes.py", "data")
SAME = {
    "a comment elsewhere": ("jobs/sweep.py", "# why\n"),
    "code elsewhere": ("jobs/sweep.py", "x = 1\n"),
    "a comment": ("data/sample.py", "# why\n"),
    "layout": ("data/sample.py", "\n\n"),
    "a bare string": ("boxes.py", '"""The area of a square."""\n'),
}
OTHER = {
    "code": ("boxes.py", "x = 1\n"),
    "code in a folder": ("data/sample.py", "x = 1\n"),
    "a string that is a value": ("data/sample.py", 'x = "one"\n'),
    "another file": ("data/other.py", ""),
}


def append(package: Path, name: str, text: str) -> None:
    with (package / name).open("a") as file:
        file.write(text)


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_the_hash_of_what_code_computes_ignores_words_and_other_parts(package: Path, change: tuple[str, str]):
    before = computing_code_hash(PARTS, package)
    append(package, *change)
    assert computing_code_hash(PARTS, package) == before


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_the_hash_of_what_code_computes_sees_every_statement(package: Path, change: tuple[str, str]):
    before = computing_code_hash(PARTS, package)
    append(package, *change)
    assert computing_code_hash(PARTS, package) != before


def test_a_part_that_is_missing_is_an_error(package: Path):
    with pytest.raises(FileNotFoundError):
        computing_code_hash(("gone.py",), package)
    with pytest.raises(FileNotFoundError):
        computing_code_hash(("gone",), package)


def test_the_hash_of_all_code_sees_every_byte(package: Path):
    before = code_hash(package)
    append(package, "jobs/sweep.py", "# why\n")
    assert code_hash(package) != before
