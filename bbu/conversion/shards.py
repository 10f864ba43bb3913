"""Converts photos, whole or as shard i of n, and merges shards into the final files.

Every photo is converted on its own, and everything that needs to see all photos (split, teachers, report)
happens in the merge, from lines sorted by photo name: that is why the number of shards, processes or
reruns cannot change a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bbu.config.domains import DataConfig, keys_used_for
from bbu.conversion.images import read_frame, write_resized
from bbu.conversion.labels import LabelRules, load_rules
from bbu.conversion.plan import PhotoPlan, plan_photo
from bbu.conversion.report import (
    REJECTS_FILE,
    SUMMARY_FILE,
    check_rejects,
    dump_rejects,
    dump_summary,
    summarise,
)
from bbu.conversion.split import site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.conversion.vendor import Reject, Unusable, find_image, list_photos, read_photo
from bbu.errors import DataError
from bbu.schema import View, dump_line, parse_record, view_to_dict

SHARD_FOLDER = ".shards"

Outcome = dict[str, Any]
"""One photo's result: name, view (None when quarantined), frame, clipped, dialect, rejects."""


def convert_photo(name: str, config: DataConfig, rules: LabelRules) -> Outcome:
    """Convert one photo and write its image; a photo that cannot be used comes back with its reason."""
    folder = Path(config.vendor_dir)
    try:
        photo = read_photo(folder, name)
        source = find_image(folder, name)
        stored, orientation = read_frame(source)
        plan = plan_photo(photo, stored, orientation, rules, config)
        image = f"{config.image_folder}/{name}.jpeg"
        write_resized(source, Path(config.data_root) / image, plan.resize, orientation, config.jpeg_quality)
    except Unusable as bad:
        return {"name": name, "view": None, "rejects": [asdict(Reject(name, bad.reason, bad.detail))]}
    return _outcome(name, photo.dialect, image, plan)


def _outcome(name: str, dialect: str, image: str, plan: PhotoPlan) -> Outcome:
    view = View((image,), plan.objects, plan.resize.width, plan.resize.height)
    rejects = [asdict(reject) for reject in plan.rejects]
    facts = {"dialect": dialect, "frame": plan.frame, "clipped": plan.clipped}
    return {"name": name, "view": view_to_dict(view), "rejects": rejects} | facts


def convert_shard(config: DataConfig, shard: int, shards: int) -> Path:
    """Convert the photos of shard `shard` (0-based) of `shards`; returns the shard's file."""
    names = _photo_names(config)[shard::shards]
    work = partial(convert_photo, config=config, rules=load_rules(config))
    header = {"fingerprint": fingerprint(config), "photos": len(names)}
    lines = [json.dumps(line, ensure_ascii=False, sort_keys=True) for line in [header, *_map(work, names, config)]]
    path = shard_path(config, shard, shards)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path


def _photo_names(config: DataConfig) -> list[str]:
    folder = Path(config.vendor_dir)
    if not folder.is_dir():
        raise DataError(f"vendor_dir {folder} is not a folder; correct it, or draw one with `python -m bbu.demo`")
    names = list_photos(folder)
    if not names:
        raise DataError(f"vendor_dir {folder} holds no .json, .jpeg or .jpg; correct vendor_dir")
    return names


def _map(work: partial[Outcome], names: list[str], config: DataConfig) -> list[Outcome]:
    processes = min(config.convert_processes or os.cpu_count() or 1, len(names))
    if processes <= 1:
        return [work(name) for name in names]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(work, names, chunksize=4))


def fingerprint(config: DataConfig) -> str:
    """Hash of the settings, the label rules and the photo list a shard was made from."""
    settings = {name: getattr(config, name) for name in keys_used_for("shard")}
    facts = [settings, asdict(load_rules(config)), _photo_names(config)]
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shard_path(config: DataConfig, shard: int, shards: int) -> Path:
    """Where shard `shard` of `shards` leaves its outcomes."""
    return Path(config.data_root) / SHARD_FOLDER / f"of-{shards}" / f"{shard}.jsonl"


def missing_shards(config: DataConfig, shards: int) -> list[int]:
    """Shards of `shards` that a merge could not take: not there, or made from other settings or photos.

    All of them where there are no photos yet.
    """
    if not Path(config.vendor_dir).is_dir():
        return list(range(shards))
    wanted = fingerprint(config)
    return [shard for shard in range(shards) if _made_from(shard_path(config, shard, shards)) != wanted]


def _made_from(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())["fingerprint"]


def merge_shards(config: DataConfig, shards: int) -> dict[str, Any]:
    """Merge all shards: split, teacher pool, JSONL files, reject report; returns the report's summary.

    Raises DataError when a shard is missing or stale, and, after everything is written, when the rejected
    share exceeds `max_reject_share`.
    """
    outcomes = sorted(_read_shards(config, shards), key=lambda outcome: outcome["name"])
    kept = [o for o in outcomes if o["view"] and (o["view"]["objects"] or config.keep_negatives)]
    held_out = val_sites((site_of(o["name"], config.site_pattern) for o in kept), config.val_ratio, config.split_seed)
    train = [_view(o) for o in kept if site_of(o["name"], config.site_pattern) not in held_out]
    val = [_view(o) for o in kept if site_of(o["name"], config.site_pattern) in held_out]
    teachers = choose_teachers(train, config.teacher_pool_size, config.split_seed)
    files = {config.train_file: train, config.val_file: val, config.teacher_file: teachers}
    counts = {"written": {name: len(views) for name, views in files.items()}, "val_sites": sorted(held_out)}
    summary = summarise(outcomes, config) | counts
    texts = {name: "".join(map(dump_line, views)) for name, views in files.items()}
    texts |= {REJECTS_FILE: dump_rejects(outcomes), SUMMARY_FILE: dump_summary(summary)}
    for name, text in texts.items():
        write_text(Path(config.data_root) / name, text)
    check_rejects(summary, config)
    return summary


def _view(outcome: Outcome) -> View:
    """Back through the schema's own checks: conversion cannot write a record that training would refuse."""
    return parse_record(json.dumps(outcome["view"]), outcome["name"]).student


def _read_shards(config: DataConfig, shards: int) -> list[Outcome]:
    paths = [shard_path(config, shard, shards) for shard in range(shards)]
    missing = [str(i) for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise DataError(f"shards {', '.join(missing)} of {shards} are missing; run `--shard I/{shards}` for each")
    wanted = fingerprint(config)
    return [outcome for path in paths for outcome in _read_shard(path, wanted)]


def _read_shard(path: Path, wanted: str) -> Iterable[Outcome]:
    header, *outcomes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if header["fingerprint"] != wanted:
        raise DataError(f"{path} was made with other settings or photos; run this shard again")
    return outcomes


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
