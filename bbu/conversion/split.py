"""Splits photos into train and val by site, so that no site is in both."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from bbu.errors import DataError


def site_of(name: str, pattern: str) -> str:
    """Find the site of a photo: the pattern's first group in the file stem, or the stem where it does not match.

    The stem is brought into Unicode form NFC before, so that a site that two systems spell differently is one.
    """
    stem = unicodedata.normalize("NFC", name.rsplit("/", 1)[-1])
    match = re.search(pattern, stem)
    if match is None:
        return stem
    return match.group(1) if match.re.groups else match.group(0)


def val_sites(sites: Iterable[str], ratio: float, seed: int) -> frozenset[str]:
    """Choose the sites for validation: those whose hash with the seed is below the ratio.

    So a site stays where it is when others are added, and many sites come to a share of `ratio`. Where no site is below
    it, the one nearest to it goes to validation; where all are, the one nearest to 1 stays in training.

    Args:
        sites: the site of each photo, in any order.
        ratio: expected share of the sites, 0 to 1; 0 chooses none.
        seed: another seed gives another choice.

    Raises:
        DataError: there is a single site, which cannot be split.
    """
    unique = sorted(set(sites), key=lambda site: _place(site, seed))
    if ratio == 0 or not unique:
        return frozenset()
    if len(unique) == 1:
        raise DataError(f"all photos are of one site ({unique[0]}); correct site_pattern or set val_ratio to 0")
    below = sum(_place(site, seed) < ratio for site in unique)
    return frozenset(unique[: min(max(below, 1), len(unique) - 1)])


def moved_sites(sites: Iterable[str], ratio: float, seed: int) -> list[str]:
    """List the sites that `val_sites` put on the other side than their hash says, because it was empty: one at most.

    Such a site may go back when sites are added.
    """
    unique = set(sites)
    chosen = val_sites(unique, ratio, seed)
    return [site for site in sorted(unique) if ratio and (site in chosen) != (_place(site, seed) < ratio)]


def _place(site: str, seed: int) -> float:
    """A number in 0..1 that depends on seed and site alone."""
    return int(stable_hash(seed, site)[:13], 16) / 16**13  # 52 bits: what a float holds


def stable_hash(seed: int, text: str) -> str:
    """Hash a text in the same way in every process and on every machine, unlike `hash`; hex, to sort by."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
