"""What a benchmark returns, and the file that keeps the newest result of each."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.run.provenance import code_hash, package_versions

RESULTS = Path(__file__).with_name("RESULTS.md")
_INTRODUCTION = """# Measured

`python -m tests.bench NAME…` measures anew and replaces the section of each name. A ratio says how many times better
ours is than what a user would otherwise use, measured in the same run. Figures differ between machines; ratios less so.
"""


@dataclass(frozen=True)
class Row:
    """One measurement beside its peer."""

    what: str
    """What was measured, with its size."""
    ours: str
    """Our figure, with its unit."""
    peer: str
    """The peer's name and figure."""
    ratio: float | None
    """How many times better ours is; below 1 it is worse. None where there is no peer."""
    limit: str
    """What the ratio, or our figure, should reach; empty where nothing is asked."""
    remark: str = ""
    """Where the time goes, if it falls short."""


def format_rows(rows: Sequence[Row], style: str = "github") -> str:
    """Format rows as a table; `style` is one of tabulate's."""
    from tabulate import tabulate  # here, so that a benchmark can name what is missing before it fails

    cells = [[r.what, r.ours, r.peer, "" if r.ratio is None else f"{r.ratio:.2f}x", r.limit, r.remark] for r in rows]
    return tabulate(cells, headers=["what", "ours", "peer", "ratio", "limit", "remark"], tablefmt=style)


def record_result(name: str, summary: str, table: str, path: Path = RESULTS) -> None:
    """Replace the section of a benchmark in the file of results.

    Args:
        name: of the benchmark.
        summary: what it measures, one line.
        table: its result, in Markdown.
        path: the file.
    """
    sections = _read_sections(path)
    sections[name] = f"## {name}\n\n{summary}\n\n{_describe_machine()}\n\n{table}\n"
    path.write_text("\n".join([_INTRODUCTION, *(sections[key] for key in sorted(sections))]), encoding="utf-8")


def _read_sections(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## "): part.rstrip("\n") + "\n" for part in parts}


def _describe_machine() -> str:
    # The hash of the code, not the commit: what is measured is often not committed yet.
    versions = ", ".join(f"{name} {version}" for name, version in package_versions(("torch", "transformers")).items())
    return f"{datetime.date.today()}, code {code_hash()[:12]}, {os.cpu_count()} cores ({_cpu_name()}), {versions}"


def _cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()
