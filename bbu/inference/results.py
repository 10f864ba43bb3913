"""What inference says of each photo: the objects in pixels of that photo, and how it went. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbu.errors import DataError, ModelError
from bbu.inference.photos import Photo
from bbu.schema import BBUObject, Box, Source

if TYPE_CHECKING:
    from PIL import Image

FAILED = "failed"
"""The status of a photo that could not be read; the others are those of `ParseStatus`."""
_STATUSES = ("ok", "repaired", "truncated", "unparsed", FAILED)


@dataclass(frozen=True)
class PhotoResult:
    """What one source detected in one photo."""

    name: str
    """The photo's path as it was given, or its number."""
    source: Source
    """What was queried: the answer, the head or both."""
    status: str
    """How it went: a `ParseStatus`, always ok for the head; `failed` for a photo that could not be read."""
    objects: tuple[BBUObject, ...] = ()
    """Boxes are in pixels of the upright photo; an answer's may reach beyond its borders."""
    scores: tuple[float, ...] = ()
    """A score in 0..1 for each object."""
    score_source: str | None = None
    """What the scores are: coordinate_probability, objectness or both; None for a photo that could not be read."""
    width: int | None = None
    """Of the upright photo, in pixels; None for a photo that could not be read."""
    height: int | None = None
    """Likewise."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of things in the answer that are not usable objects."""
    error: str | None = None
    """Why the photo could not be read."""
    photo: Photo | None = field(default=None, repr=False, compare=False)
    """The photo itself, where it can still be read."""

    @property
    def boxes(self) -> list[Box]:
        """(x1, y1, x2, y2) of each object, in pixels of the upright photo."""
        return [item.bbox_2d for item in self.objects]

    @property
    def captions(self) -> list[str]:
        """The description of each object."""
        return [item.desc for item in self.objects]

    def to_dict(self) -> dict[str, Any]:
        """Describe the photo as a view in its own pixels, with a score beside each object, and how it went."""
        objects = [
            {"bbox_2d": [round(c, 1) for c in item.bbox_2d], "desc": item.desc, "score": round(score, 4)}
            for item, score in zip(self.objects, self.scores, strict=True)
        ]
        data = {"images": [self.name], "objects": objects, "width": self.width, "height": self.height}
        data |= {"source": self.source, "status": self.status, "score_source": self.score_source}
        optional = {"rejected": dict(self.rejected), "error": self.error}
        return data | {key: value for key, value in optional.items() if value}

    def draw(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the objects into a copy of the photo.

        Args:
            image: the photo; None reads it again, where it came from.

        Raises:
            DataError: the photo cannot be read.
            ModelError: no font is installed, or the photo is not known any more and must be given.
        """
        from bbu.inference.drawing import draw_detections

        photo = Photo(self.name, image) if image is not None else self.photo
        if self.error is not None:
            raise DataError(self.error)
        if photo is None:
            raise ModelError(f"{self.name}: an image of an iterator is not kept; pass it: result.draw(image)")
        return draw_detections(photo.load(), self.boxes, self.captions)

    def save(self, path: str | Path, image: Image.Image | None = None) -> Path:
        """Write the drawn photo to a file, whose suffix decides its format; returns its path.

        Args:
            path: the file; its folder is made where absent.
            image: as for `draw`.
        """
        picture, target = self.draw(image), Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix.lower() == ".png":
            picture.save(target, compress_level=1)  # the default takes several times as long for a tenth of the bytes
        else:
            picture.save(target)
        return target


class DetectionLists(tuple[list[list[Box]], list[list[str]]]):
    """The pair (boxes, captions), a list of each for every photo, which also knows the results that they come from."""

    results: tuple[PhotoResult, ...]
    """One for each photo, in the same order."""

    def __new__(cls, results: Iterable[PhotoResult]) -> DetectionLists:
        results = tuple(results)
        pair = super().__new__(cls, ([item.boxes for item in results], [item.captions for item in results]))
        pair.results = results
        return pair

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copy and pickle
        return (self.results,)

    @property
    def boxes(self) -> list[list[Box]]:
        """A list of (x1, y1, x2, y2) for every photo."""
        return self[0]

    @property
    def captions(self) -> list[list[str]]:
        """A list of descriptions for every photo."""
        return self[1]


class Tally:
    """Counts how photos went, for the one line that a person reads at the end."""

    def __init__(self, results: Sequence[PhotoResult] = ()) -> None:
        self._statuses: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        for result in results:
            self.add(result)

    def add(self, result: PhotoResult) -> None:
        """Count one more photo."""
        self._statuses[result.status] += 1
        self._rejected.update(result.rejected)

    @property
    def photos(self) -> int:
        """How many photos there were."""
        return self._statuses.total()

    @property
    def failed(self) -> int:
        """How many photos could not be read."""
        return self._statuses[FAILED]

    @property
    def is_all_well(self) -> bool:
        """Whether every photo is ok and nothing in the answers was left out."""
        return self._statuses["ok"] == self.photos and not self._rejected

    def __str__(self) -> str:
        """`12 photos: 9 ok, 2 truncated, 1 failed; not usable in the answers: bad_box 3`."""
        counts = [f"{self._statuses[name]} {name}" for name in _STATUSES if self._statuses[name]]
        text = f"{self.photos} photos" + (f": {', '.join(counts)}" if counts else "")
        if self._statuses["truncated"]:
            text += "; truncated answers end at generation_max_new_tokens"
        if self._rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self._rejected.items()))
            text += f"; not usable in the answers: {reasons}"
        return text
