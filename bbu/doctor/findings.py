"""Findings: what `bbu.doctor` reports, in one form, and how they are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"
GB = 1e9
"""Bytes."""
LEAST_FREE_GB = 5
"""Below this a filesystem holds hardly one checkpoint of the 3B model."""

Call = Callable[[Sequence[str]], tuple[int, str, str]]
"""Runs a command and returns exit code, output and error; 127 where it is not there. See bbu.jobs.queue."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str
    """OK, WARNING or FAILURE."""
    what: str
    """What was checked, and the result."""
    remedy: str = ""
    """What to do about a warning or a failure."""


Judgement = Callable[[str, str], Finding]
"""`warning` or `failure`: how grave a problem is can depend on the profile."""


@dataclass(frozen=True)
class Group:
    """The findings about one thing."""

    title: str
    """What they are about: this machine, Slurm, a node."""
    findings: tuple[Finding, ...]
    """In the order in which they are printed."""


def ok(what: str) -> Finding:
    """Return a finding that needs no remedy."""
    return Finding(OK, what)


def warning(what: str, remedy: str) -> Finding:
    """Return a finding that may cause trouble later."""
    return Finding(WARNING, what, remedy)


def failure(what: str, remedy: str) -> Finding:
    """Return a finding that keeps jobs from running."""
    return Finding(FAILURE, what, remedy)


def any_failed(groups: Sequence[Group]) -> bool:
    """Return whether a finding of these groups is a failure."""
    return any(finding.status == FAILURE for group in groups for finding in group.findings)


def print_group(group: Group) -> None:
    """Print the findings of a group under its title."""
    print(f"\n{group.title}")
    for finding in group.findings:
        print(f"  {finding.status:<8} {finding.what}")
        if finding.remedy:
            print(f"           -> {finding.remedy}")
    sys.stdout.flush()


def summary_line(groups: Sequence[Group]) -> str:
    """Return the last line of the report: ready or not, and how many warnings and failures there are."""
    statuses = [finding.status for group in groups for finding in group.findings]
    counts = {status: statuses.count(status) for status in (FAILURE, WARNING)}
    parts = ", ".join(f"{count} {status}{'s' * (count > 1)}" for status, count in counts.items() if count)
    return f"\n{'Not ready' if counts[FAILURE] else 'Ready'}{f': {parts}' if parts else ''}."


def findings_json(groups: Sequence[Group]) -> str:
    """Return all findings as a JSON list of objects with group, status, what and remedy."""
    rows = [{"group": group.title, **asdict(finding)} for group in groups for finding in group.findings]
    return json.dumps(rows, ensure_ascii=False, indent=1)
