"""What is left out of the data, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reject:
    """Something that is left out of the data: a whole photo or one of its objects."""

    photo: str
    """Name of the photo: its path below the vendor folder, without suffix."""
    reason: str
    """One word of a fixed set, such as `empty_box`."""
    detail: str
    """What is wrong, for a person."""
    index: int | None = None
    """Number of the object among the photo's annotations, from 0; None for the whole photo."""


class Unusable(Exception):
    """A photo or one of its objects cannot be used; whoever catches this makes it a `Reject`.

    Args:
        reason: one word of a fixed set, such as `empty_box`.
        detail: what is wrong, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
