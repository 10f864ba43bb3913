"""The reject report: what was kept, what was left out and why, for the person who received the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bbu.config.domains import DataConfig
from bbu.errors import DataError

SUMMARY_FILE = "conversion_report.json"
REJECTS_FILE = "rejects.jsonl"
LABEL_REASONS = ("unknown_object_type", "unknown_property")


def summarise(outcomes: Sequence[Mapping[str, Any]], config: DataConfig) -> dict[str, Any]:
    """Counts of photos and objects, kept and left out, by reason."""
    views = [o["view"] for o in outcomes if o["view"]]
    rejects = [reject for o in outcomes for reject in o["rejects"]]
    objects = [item for view in views for item in view["objects"]]
    negatives = sum(not view["objects"] for view in views)
    return {
        "photos": {
            "seen": len(outcomes),
            "rejected": _count(r["reason"] for r in rejects if r["index"] is None),
            "negatives": negatives,
            "negatives_kept": config.keep_negatives,
            "dialects": _count(o["dialect"] for o in outcomes if o["view"]),
            "frames": _count(o["frame"] for o in outcomes if o["view"]),
        },
        "objects": {
            "kept": len(objects),
            "clipped": sum(o["clipped"] for o in outcomes if o["view"]),
            "rejected": _count(r["reason"] for r in rejects if r["index"] is not None),
            "labels": _count(item["desc"] for item in objects),
        },
    }


def check_rejects(summary: Mapping[str, Any], config: DataConfig) -> None:
    """Raise DataError when more photos or objects were rejected, or labels refused, than the config allows.

    Duplicates and labels outside the hierarchy are no defects: they are filtered because the config says so.
    """
    photos, objects = summary["photos"], summary["objects"]
    defects = {r: n for r, n in objects["rejected"].items() if r not in (*LABEL_REASONS, "duplicate")}
    _check_share("photos", photos["rejected"], photos["seen"], config)
    _check_share("objects", defects, objects["kept"] + sum(defects.values()), config)
    unknown = sum(objects["rejected"].get(reason, 0) for reason in LABEL_REASONS)
    if unknown and config.unknown_label_policy == "refuse":
        raise DataError(
            f"{unknown} objects have labels outside {config.label_hierarchy_file}; see "
            f"{config.data_root}/{REJECTS_FILE}, add the labels or set unknown_label_policy to drop"
        )


def _check_share(what: str, reasons: Mapping[str, int], seen: int, config: DataConfig) -> None:
    rejected = sum(reasons.values())
    if rejected > config.max_reject_share * seen:
        raise DataError(
            f"{rejected} of {seen} {what} rejected {dict(reasons)}, over max_reject_share "
            f"{config.max_reject_share}; see {config.data_root}/{REJECTS_FILE}, repair the files or raise the share"
        )


def dump_rejects(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """One JSON line per reject, in the order of the photos."""
    rejects = (reject for o in outcomes for reject in o["rejects"])
    return "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rejects)


def dump_summary(summary: Mapping[str, Any]) -> str:
    """The summary as indented JSON, ending in a newline."""
    return json.dumps(summary, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def _count(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
