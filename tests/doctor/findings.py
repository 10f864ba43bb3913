"""What the doctor's tests share: the checkout, changed profiles, and how to pick findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bbu.doctor.findings import FAILURE, Finding
from bbu.jobs.clusters import ClusterProfile

CHECKOUT = Path(__file__).resolve().parents[2]


def with_train(profile: ClusterProfile, **changes: Any) -> ClusterProfile:
    """The profile with other requests of its training job."""
    return dataclasses.replace(profile, train=dataclasses.replace(profile.train, **changes))


def the_finding(findings: Iterable[Finding], words: str) -> Finding:
    """The one finding whose line holds these words."""
    matches = [finding for finding in findings if words in finding.what]
    assert len(matches) == 1, matches
    return matches[0]


def lines_of(findings: Iterable[Finding], status: str = FAILURE) -> list[str]:
    """The lines of all findings of this status; each must have a remedy."""
    matches = [finding for finding in findings if finding.status == status]
    assert all(finding.remedy for finding in matches)
    return [finding.what for finding in matches]
