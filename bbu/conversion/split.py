"""Splits photos into train and val by site, so that no site is in both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from bbu.errors import DataError


def site_of(name: str, pattern: str) -> str:
    """Find the site of a photo: the pattern's first group in the file stem, or the stem where it does not match."""
    stem = name.rsplit("/", 1)[-1]
    match = re.search(pattern, stem)
    if match is None:
        return stem
    return match.group(1) if match.re.groups else match.group(0)


def val_sites(sites: Iterable[str], ratio: float, seed: int) -> frozenset[str]:
    """Choose a share of the sites for validation, at least one and not all of them.

    They are chosen by a hash of seed and site, so that most sites stay where they are when others are added.

    Args:
        sites: the site of each photo, in any order.
        ratio: share of the sites, 0 to 1; 0 chooses none.
        seed: another seed gives another choice.

    Raises:
        DataError: there is a single site, which cannot be split.
    """
    unique = sorted(set(sites), key=lambda site: stable_hash(seed, site))
    if ratio == 0 or not unique:
        return frozenset()
    if len(unique) == 1:
        raise DataError(f"all photos are of one site ({unique[0]}); correct site_pattern or set val_ratio to 0")
    count = min(max(round(ratio * len(unique)), 1), len(unique) - 1)
    return frozenset(unique[:count])


def stable_hash(seed: int, text: str) -> str:
    """Hash a text in the same way in every process and on every machine, unlike `hash`; hex, to sort by."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
