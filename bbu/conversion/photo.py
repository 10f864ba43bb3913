"""Converts one photo: its JSON and the bytes of its JPEG in, the outcome and the bytes of a resized JPEG out.

A photo is converted without any knowledge of the others, so that photos can be shared among processes and jobs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from bbu.config.domains import DataConfig
from bbu.conversion.coordinates import check_shares, may_be_percent, reach_of_boxes
from bbu.conversion.frames import possible_frames, upright_size
from bbu.conversion.images import make_resized, read_frame
from bbu.conversion.labels import LabelRules
from bbu.conversion.plan import PhotoPlan, plan_photo
from bbu.conversion.rejects import Reject
from bbu.conversion.vendor import VendorPhoto
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
    """The frame that the vendor's boxes were in; see `frames.Frame`."""
    decides_frame: bool
    """EXIF turns it in a way that changes its size, so that the vendor's size shows the frame."""
    may_be_percent: bool
    """The vendor's boxes all lie within 0..100 of a much larger photo."""
    reach: float
    """How far the vendor's boxes reach to the right or down, as a share of the photo."""
    clipped: int
    """Boxes that were cut at the image border."""
    respelled: tuple[str, ...]
    """Labels of its objects that the label files spell with other brackets or character widths."""


@dataclass(frozen=True)
class PhotoOutcome:
    """What became of one photo."""

    name: str
    """Path below the vendor folder, without suffix."""
    photo: ConvertedPhoto | None
    """None where the photo as a whole was rejected."""
    rejects: tuple[Reject, ...]
    """The photo itself or those of its objects that were left out, with reasons."""
    stored: PhotoOutcome | None = None
    """What became of it if its boxes are in the stored frame, where its own size does not decide that."""


def convert_photo(
    photo: VendorPhoto, jpeg: bytes, image: str, config: DataConfig, rules: LabelRules
) -> tuple[PhotoOutcome, bytes]:
    """Convert one photo.

    Args:
        photo: what the vendor says of it.
        jpeg: the vendor's file.
        image: path of the resized image, relative to data_root.
        config: how it is converted.
        rules: how labels are written.

    Returns:
        What became of it; the resized image's file.

    Raises:
        Unusable: the photo cannot be used.
    """
    check_shares(photo)
    stored, orientation = read_frame(jpeg)
    frames = possible_frames(photo, stored, orientation, config.exif_frame)
    plans = [plan_photo(photo, stored, orientation, frame, rules, config) for frame in frames]
    resized = make_resized(jpeg, plans[0].resize, orientation, config.jpeg_quality)
    facts = {
        "sha256": hashlib.sha256(resized).hexdigest(),
        "dialect": photo.dialect,
        "decides_frame": upright_size(stored, orientation) != stored,
        "may_be_percent": may_be_percent(photo),
        "reach": reach_of_boxes(photo),
    }
    first, *others = [
        PhotoOutcome(photo.name, _build_photo(image, plan, frame=frame, **facts), plan.rejects)
        for frame, plan in zip(frames, plans, strict=True)
    ]
    return (replace(first, stored=others[0]) if others else first), resized


def _build_photo(image: str, plan: PhotoPlan, **facts: Any) -> ConvertedPhoto:
    view = View((image,), plan.objects, plan.resize.width, plan.resize.height)
    return ConvertedPhoto(view, clipped=plan.clipped, respelled=plan.respelled, **facts)


def outcome_to_dict(outcome: PhotoOutcome) -> dict[str, Any]:
    """Convert an outcome to its JSON form in a shard."""
    data = asdict(outcome)
    if outcome.photo:
        data["photo"]["view"] = view_to_dict(outcome.photo.view)
    if outcome.stored:
        data["stored"] = outcome_to_dict(outcome.stored)
    return data


def parse_outcome(data: dict[str, Any]) -> PhotoOutcome:
    """Convert back what `outcome_to_dict` made; the schema checks the view as it will check the record."""
    photo = _parse_photo(data["photo"], data["name"]) if data["photo"] else None
    rejects = tuple(Reject(**reject) for reject in data["rejects"])
    return PhotoOutcome(data["name"], photo, rejects, parse_outcome(data["stored"]) if data["stored"] else None)


def _parse_photo(data: dict[str, Any], name: str) -> ConvertedPhoto:
    view = parse_record(json.dumps(data.pop("view")), name).student
    return ConvertedPhoto(view, respelled=tuple(data.pop("respelled")), **data)
