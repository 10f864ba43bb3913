"""What the doctor's tests share: a profile of two nodes, and how to look among findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bbu.doctor.findings import FAILURE, Finding
from bbu.jobs.clusters import ClusterProfile


def asking(profile: ClusterProfile, **changes: Any) -> ClusterProfile:
    """The profile with other wishes of its training job."""
    return dataclasses.replace(profile, train=dataclasses.replace(profile.train, **changes))


def named(findings: Iterable[Finding], word: str) -> Finding:
    """The one finding that says this."""
    found = [finding for finding in findings if word in finding.what]
    assert len(found) == 1, found
    return found[0]


def bad(findings: Iterable[Finding], status: str = FAILURE) -> list[str]:
    """What the findings of this status say; each must have a remedy."""
    found = [finding for finding in findings if finding.status == status]
    assert all(finding.remedy for finding in found)
    return [finding.what for finding in found]
