"""Converts one photo: its JSON and JPEG in, a resized JPEG and the outcome out.

A photo is converted without any knowledge of the others, so that photos can be shared among processes and jobs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import DataConfig
from bbu.conversion.images import read_frame, write_resized
from bbu.conversion.labels import LabelRules
from bbu.conversion.plan import plan_photo
from bbu.conversion.vendor import Reject, Unusable, find_image, read_photo
from bbu.schema import View, parse_record, view_to_dict


@dataclass(frozen=True)
class ConvertedPhoto:
    """A photo that has its place in the data."""

    view: View
    """The resized image and its objects."""
    sha256: str
    """SHA-256, in hex, of the bytes of the resized image's file."""
    dialect: str
    """Dialect of the vendor's JSON: A or B."""
    frame: str
    """The frame that the vendor's boxes were in; see `plan.choose_frame`."""
    clipped: int
    """Boxes that were cut at the image border."""


@dataclass(frozen=True)
class PhotoOutcome:
    """What became of one photo."""

    name: str
    """Path below the vendor folder, without suffix."""
    photo: ConvertedPhoto | None
    """None where the photo as a whole was rejected."""
    rejects: tuple[Reject, ...]
    """The photo itself or those of its objects that were left out, with reasons."""


def convert_photo(name: str, config: DataConfig, rules: LabelRules) -> PhotoOutcome:
    """Convert one photo and write its image; a photo that cannot be used comes back with its reason."""
    folder = Path(config.vendor_dir)
    try:
        photo = read_photo(folder, name)
        source = find_image(folder, name)
        stored, orientation = read_frame(source)
        plan = plan_photo(photo, stored, orientation, rules, config)
        image = f"{config.image_folder}/{name}.jpeg"
        target = Path(config.data_root) / image
        sha256 = write_resized(source, target, plan.resize, orientation, config.jpeg_quality)
    except Unusable as unusable:
        return PhotoOutcome(name, None, (Reject(name, unusable.reason, unusable.detail),))
    view = View((image,), plan.objects, plan.resize.width, plan.resize.height)
    return PhotoOutcome(name, ConvertedPhoto(view, sha256, photo.dialect, plan.frame, plan.clipped), plan.rejects)


def dump_outcome(outcome: PhotoOutcome) -> str:
    """Write an outcome as one JSON line of a shard, newline included."""
    data = asdict(outcome)
    if outcome.photo:
        data["photo"]["view"] = view_to_dict(outcome.photo.view)
    return json.dumps(data, ensure_ascii=False, sort_keys=True) + "\n"


def parse_outcome(line: str) -> PhotoOutcome:
    """Read a line that `dump_outcome` wrote; the schema checks the view as it will check the record."""
    data = json.loads(line)
    photo = _parse_photo(data["photo"], data["name"]) if data["photo"] else None
    return PhotoOutcome(data["name"], photo, tuple(Reject(**reject) for reject in data["rejects"]))


def _parse_photo(data: dict[str, Any], name: str) -> ConvertedPhoto:
    view = parse_record(json.dumps(data.pop("view")), name).student
    return ConvertedPhoto(view, **data)
