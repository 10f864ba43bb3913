"""YAML files as people deliver them: encodings, line ends, and what YAML 1.1 would read into them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.config.strict_yaml import parse_yaml
from bbu.config.yaml_files import read_yaml
from bbu.errors import ConfigError

TEXT = "path: 模型\nsteps: 5\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_saved_on_windows_is_read_as_it_is(tmp_path: Path, encoding: str, line_end: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(TEXT.replace("\n", line_end).encode(encoding))
    assert read_yaml(path) == {"path": "模型", "steps": 5}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (TEXT.encode("gb18030"), "line 1 is not UTF-8 text; save it as UTF-8 (iconv -f GB18030"),
        (b"a:\n\tb: 1\n", "line 2: a tab; indent with spaces"),
        (b"a: 1\n b: 2\n", "line 2: mapping values are not allowed here"),
        (b"a: 1\n---\nb: 2\n", "line 2: expected a single document in the stream but found another document"),
        (b"a:1\nb: 2\n", "line 2: mapping values are not allowed here"),
        (b"", "is empty"),
        (b"# comments alone\n", "is empty"),
        (b"- a\n", "must be a mapping of keys to values"),
        (b"a: \x00", "not valid YAML (unacceptable character"),
        (b"a: 1\n" * 9, "duplicate key 'a' in lines 1 and 4; keep one"),
        (b"a: 1\n" * 12, "… and 8 more keys stand twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert problem in str(caught.value) and all(text.startswith(f"{path}: ") for text in caught.value.findings)


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("24:00:00", "24:00:00"), ("010", "010"), ("2024-01-02", "2024-01-02"), ("0", 0), ("-1", -1), ("1_000", 1000),
     ("5e-6", 5e-6), (".5", 0.5), ("1.", 1.0), ("0x10", 16), ("true", True), ("null", None), (".inf", float("inf"))],
)  # fmt: skip
def test_a_value_is_what_a_person_sees_in_it(text: str, value: object):
    read = parse_yaml(text)
    assert (read, type(read)) == (value, type(value))
