"""The file of benchmark results keeps the newest result of each benchmark."""

from __future__ import annotations

from tests.bench.__main__ import list_benchmarks
from tests.bench._results import Row, format_rows, record_result


def test_a_new_result_replaces_the_section_of_its_benchmark_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    record_result("second", "Two.", "old table", path)
    record_result("first", "One.", "a table", path)
    record_result("second", "Two.", "new table", path)
    text = path.read_text()
    assert text.index("## first") < text.index("## second")
    assert "a table" in text and "new table" in text and "old table" not in text


def test_a_row_without_a_peer_has_no_ratio():
    table = format_rows([Row("start", "2 s", "", None, ""), Row("matching", "1 ms", "theirs 4 ms", 4.0, "3x")])
    assert table.count("4.00x") == 1 and "None" not in table


def test_helpers_are_no_benchmarks():
    assert "matcher" in list_benchmarks()
    assert not any(name.startswith("_") for name in list_benchmarks())
