"""Decides what only all photos of a drop say together: the EXIF frame of some, and whether numbers are pixels at all.

The merge decides it, from the outcomes of all shards, so that the number of shards has no influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bbu.conversion.photo import ConvertedPhoto, PhotoOutcome
from bbu.errors import DataError

_FEWEST_FOR_PERCENT = 3
"""Photos with objects from which on it is no chance that every box of every photo lies within 0..100."""
_FEWEST_FOR_REACH, _SHORT_REACH = 10, 0.5
"""Photos with objects from which on it is no chance that no box reaches beyond this share of its photo: the middle."""
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class FrameChoice:
    """How the boxes of the photos were read that EXIF turns without a change of their size."""

    undecided: int
    """Photos with boxes whose frame their own size does not decide."""
    frame: str | None
    """The frame that was taken for them: upright or stored; None where there are none."""
    upright_photos: int
    """Photos turned by EXIF whose size says that their boxes are in the upright frame."""
    stored_photos: int
    """Photos turned by EXIF whose size says that their boxes are in the stored frame."""
    examples: tuple[str, ...]
    """Names of the first of the photos whose frame their own size does not decide."""


def choose_frames(outcomes: Sequence[PhotoOutcome]) -> tuple[list[PhotoOutcome], FrameChoice]:
    """Choose a frame for the photos that cannot decide it: the one that all others speak for, else upright.

    Returns:
        The outcomes in the same order, each with one frame; how it was chosen.
    """
    stored = sum(_speaks_for(outcome, stored=True) for outcome in outcomes)
    upright = sum(_speaks_for(outcome, stored=False) for outcome in outcomes)
    takes_stored = stored > 0 and upright == 0
    undecided = [outcome.name for outcome in outcomes if outcome.stored]
    chosen = [outcome.stored if takes_stored and outcome.stored else outcome for outcome in outcomes]
    frame = "stored" if takes_stored else "upright"
    examples = tuple(undecided[:_NAMES_SHOWN])
    return chosen, FrameChoice(len(undecided), frame if undecided else None, upright, stored, examples)


def frame_warnings(choice: FrameChoice) -> list[str]:
    """Say how the photos that cannot decide their EXIF frame were read, and how sure that is."""
    if not choice.undecided:
        return []
    text = (
        f"{choice.undecided} photos ({_list_names(choice.examples, choice.undecided)}): EXIF orientation turns them "
        "without a change of size, so that the size does not say whether their boxes are upright or as stored; read as "
        f"{choice.frame}"
    )
    others = choice.upright_photos + choice.stored_photos
    if not others:
        return [f"{text}: look at some of them, and set exif_frame if it is wrong"]
    if choice.upright_photos and choice.stored_photos:
        split = f"{choice.upright_photos} are upright and {choice.stored_photos} as stored"
        return [f"{text}: of the other turned photos {split}; look at some of them, and set exif_frame if it is wrong"]
    return [f"{text}, as the {others} other photos that EXIF turns"]


def scale_warnings(outcomes: Sequence[PhotoOutcome]) -> list[str]:
    """Say which boxes may be in another unit than pixels of their photo."""
    photos = _photos_with_objects(outcomes)
    warnings = []
    if percent := [name for name, photo in photos.items() if photo.may_be_percent]:
        warnings.append(
            f"{len(percent)} of {len(photos)} photos with objects have all boxes within 0..100, far inside a large "
            f"photo: are they percent instead of pixels? ({_list_names(percent, len(percent))})"
        )
    reach = max((photo.reach for photo in photos.values()), default=1.0)
    if len(photos) >= _FEWEST_FOR_REACH and reach <= _SHORT_REACH:
        warnings.append(
            f"no box of {len(photos)} photos with objects reaches beyond {reach:.0%} of its photo, to the right or "
            "down: are they thousandths of the image, or pixels of a smaller copy?"
        )
    return warnings


def check_scale(outcomes: Sequence[PhotoOutcome]) -> None:
    """Check that the boxes of a whole drop are not percent.

    Raises:
        DataError: every box of every photo lies within 0..100, in photos much larger than that.
    """
    photos = _photos_with_objects(outcomes)
    if len(photos) >= _FEWEST_FOR_PERCENT and all(photo.may_be_percent for photo in photos.values()):
        raise DataError(
            f"all boxes of all {len(photos)} photos with objects lie within 0..100, in photos much larger than that: "
            "they are percent of the image, not pixels; change the vendor's files to pixels"
        )


def _photos_with_objects(outcomes: Sequence[PhotoOutcome]) -> dict[str, ConvertedPhoto]:
    return {outcome.name: outcome.photo for outcome in outcomes if outcome.photo and outcome.photo.view.objects}


def _list_names(names: Sequence[str], count: int) -> str:
    """The first of `count` names."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if count > _NAMES_SHOWN else "")


def _speaks_for(outcome: PhotoOutcome, *, stored: bool) -> bool:
    """Whether a photo's own size says that its boxes are in the stored frame, or that they are in the upright one."""
    photo = outcome.photo
    return photo is not None and photo.decides_frame and (photo.frame == "stored") == stored
