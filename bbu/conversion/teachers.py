"""Chooses the pool of worked examples (teachers) from the training photos."""

from __future__ import annotations

from collections.abc import Sequence

from bbu.conversion.split import stable_hash
from bbu.schema import View


def choose_teachers(views: Sequence[View], size: int, seed: int) -> list[View]:
    """Choose up to `size` views that together show as many descriptions as possible, with few objects each.

    Greedy set cover: each time the view with the most descriptions that no chosen view shows; among equals the one
    with the fewest objects, then by a hash with `seed`. When every description is shown, the cover starts again, so
    that each description has several examples.
    """
    left = sorted((v for v in views if v.objects), key=lambda v: stable_hash(seed, v.images[0]))
    chosen: list[View] = []
    shown: set[str] = set()
    while left and len(chosen) < size:
        best = max(left, key=lambda v: (len(_labels(v) - shown), -len(v.objects)))
        if shown and not _labels(best) - shown:
            shown = set()
            continue
        left.remove(best)
        chosen.append(best)
        shown |= _labels(best)
    return chosen


def _labels(view: View) -> set[str]:
    return {item.desc for item in view.objects}
