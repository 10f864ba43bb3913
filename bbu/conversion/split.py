"""Splits photos into train and val by site, so that no site is in both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from bbu.errors import DataError


def site_of(name: str, pattern: str) -> str:
    """The site a photo belongs to: the pattern's first group in the file stem, else the stem itself."""
    stem = name.rsplit("/", 1)[-1]
    match = re.search(pattern, stem)
    if match is None:
        return stem
    return match.group(1) if match.re.groups else match.group(0)


def val_sites(sites: Iterable[str], ratio: float, seed: int) -> frozenset[str]:
    """Choose `ratio` of the sites for validation, by a hash of seed and site: stable when sites are added.

    At least one site goes to each side. Raises DataError when a single site cannot be split.
    """
    unique = sorted(set(sites), key=lambda site: stable_hash(seed, site))
    if ratio == 0 or not unique:
        return frozenset()
    if len(unique) == 1:
        raise DataError(f"all photos are of one site ({unique[0]}); correct site_pattern or set val_ratio to 0")
    count = min(max(round(ratio * len(unique)), 1), len(unique) - 1)
    return frozenset(unique[:count])


def stable_hash(seed: int, text: str) -> str:
    """The same order in every process and on every machine, unlike `hash`."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
