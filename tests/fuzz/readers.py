"""The readers under test: for each one what valid input is, and the in-process call by which an entry reads it.

A reader may return, or raise an error of `bbu.errors`. Some may never raise: whatever a photo or an answer holds is
their result. Several are also held to what must be true of their results.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from bbu.config.domains import DataConfig
from bbu.config.label_files import load_label_scheme
from bbu.config.read import CONFIG_DIR, load_config, load_recorded_config
from bbu.conversion.labels import LabelRules, load_rules
from bbu.conversion.listing import list_vendor_folder
from bbu.conversion.reuse import convert_photos
from bbu.conversion.shard_files import read_shard, write_shard
from bbu.data.images import load_image, read_size
from bbu.errors import DataError
from bbu.evaluation.metrics import EvaluationResult
from bbu.evaluation.predictions import Prediction, append_predictions, drop_cut_line, read_predictions
from bbu.evaluation.report import metrics_table
from bbu.evaluation.run_settings import RunSettings
from bbu.evaluation.scores import best_scores, latest_scores, other_scores
from bbu.inference.parse import parse_answer
from bbu.inference.photos import Photo
from bbu.jobs.clusters import load_profile
from bbu.jobs.records import read_records as read_job_records
from bbu.run.checkpoints import Manifest, verify
from bbu.run.folder import RunFolder
from bbu.run.lease import Owner, take_run_lease
from bbu.run.ledger import Ledger
from bbu.run.provenance import record_start
from bbu.run.status import read_status
from bbu.schema import dump_line, parse_record, read_distinct_records
from tests.fuzz.hostile import damage_bytes, damage_text, hostile_json, hostile_lines

FINGERPRINT = "f"
OTHER_FORMATS = ("PNG", "WEBP", "TIFF", "GIF", "BMP")
OLD_RUN = Path(__file__).parents[1] / "run" / "old_run_folder"


@dataclass(frozen=True)
class Reader:
    """One way into the project for data that others wrote."""

    name: str
    """What it reads."""
    make: Callable[[random.Random], bytes]
    """Makes the content of one hostile input."""
    read: Callable[[Path, bytes], object]
    """Reads it as an entry does; the folder is empty, and the reader's own."""
    may_refuse: bool = True
    """Whether an error of `bbu.errors` is a right outcome."""
    cost: int = 1
    """How much slower than the others it is: it gets so much fewer inputs."""


LABEL_ZH = {"标签": "连接点（螺丝）/BBU安装螺丝/连接正确", "备注": "左侧"}
VENDOR_A = {
    "info": {"width": 64, "height": 48, "depth": 3},
    "dataList": [
        {"coordinates": [[4, 5], [30, 40]], "properties": {"contentZh": LABEL_ZH}},
        {"coordinates": [[50.5, 40.5], [33, 7]], "properties": {"contentZh": {"标签": "BBU品牌/华为"}}},
    ],
}
VENDOR_B = {
    "info": {"width": 64, "height": 48, "depth": 3},
    "tagInfo": {"statistcs": [1, 2]},
    "version": "1.0",
    "markResult": {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "ExtentPolygon", "coordinates": [[[4, 5], [30, 5], [30, 40], [4, 40]]]},
                "properties": {
                    "content": {"label": "connection_point/install_screw/install_screw_true", "question": ["a"]},
                    "contentZh": LABEL_ZH,
                },
            }
        ],
    },
}
OBJECTS = [
    {"bbox_2d": [4, 5, 30, 40], "desc": "螺丝连接点/BBU安装螺丝/安装正确"},
    {"bbox_2d": [33, 7, 50, 40], "desc": "标签贴纸"},
]
VIEW = {"images": ["photos/a.jpeg"], "objects": OBJECTS, "width": 64, "height": 48}
RECORDS = [VIEW, {"teachers": [VIEW | {"images": ["photos/t.jpeg"]}], "student": VIEW | {"images": ["photos/b.jpeg"]}}]
PREDICTION = {
    "image": "photos/a.jpeg", "status": "ok", "score_source": "objectness", "width": 64, "height": 48,
    "rejected": {"bad_box": 1}, "objects": [item | {"score": 0.5} for item in OBJECTS],
}  # fmt: skip


@cache
def picture(kind: str) -> bytes:
    """A small picture with structure, in a format of Pillow; `exif` is a JPEG that a phone held sideways."""
    image = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    options = {"exif": {"exif": exif}, "progressive": {"progressive": True}}.get(kind, {})
    image.save(buffer, kind if kind in OTHER_FORMATS else "JPEG", **options)
    return buffer.getvalue()


def hostile_picture(rng: random.Random, kinds: tuple[str, ...]) -> bytes:
    return damage_bytes(rng, picture(rng.choice(kinds)))


def hostile_text_of(rng: random.Random, paths: tuple[Path, ...]) -> bytes:
    """One of some files of the project, damaged as a text, at times with a value that is too much for a scalar."""
    data = rng.choice(paths).read_bytes()
    if rng.random() < 0.4:
        lines = data.split(b"\n")
        line = rng.randrange(len(lines))
        lines[line] = (
            lines[line].partition(b":")[0] + b": " + hostile_json(rng, [1, "a", {"b": [2]}]).replace(b"\n", b" ")
        )
        return b"\n".join(lines)
    return damage_text(rng, data)


def hostile_annotations(rng: random.Random) -> bytes:
    return hostile_json(rng, rng.choice((VENDOR_A, VENDOR_B)))


def hostile_answer(rng: random.Random) -> bytes:
    """What a model might write: its list of objects, damaged, repeated without end, or something else."""
    data = hostile_json(rng, OBJECTS * rng.choice((1, 1, 5)))
    return data * rng.choice((1, 1, 1, 3)) if len(data) < 10_000 else data


@cache
def _data_config(folder: Path) -> DataConfig:
    settings = (f"vendor_dir={folder}/vendor", f"data_root={folder}/data", "convert_processes=1")
    return load_config("smoke", overrides=settings).data


@cache
def _label_rules() -> LabelRules:
    return load_rules(_data_config(Path("any")))


def read_vendor_json(folder: Path, content: bytes) -> object:
    return _convert(folder, content, picture("JPEG"))


def read_vendor_picture(folder: Path, content: bytes) -> object:
    return _convert(folder, json.dumps(VENDOR_A).encode(), content)


def _convert(folder: Path, annotations: bytes, jpeg: bytes) -> object:
    """Convert one photo; its outcome must survive the file of a shard, and its record the training."""
    config, shard = _data_config(folder), folder / "0.jsonl"
    vendor = Path(config.vendor_dir)
    vendor.mkdir(exist_ok=True)
    (vendor / "a.json").write_bytes(annotations)
    (vendor / "a.jpeg").write_bytes(jpeg)
    (result,) = results = convert_photos(list_vendor_folder(vendor).photos, config, _label_rules())
    write_shard(shard, FINGERPRINT, results)
    assert read_shard(shard, FINGERPRINT) == {"a": result}
    photo = result.outcome.photo
    if photo:
        assert parse_record(dump_line(photo.view), "a").student == photo.view
        with Image.open(Path(config.data_root) / photo.view.images[0]) as image:
            assert image.size == (photo.view.width, photo.view.height)
    assert photo or result.outcome.rejects
    return result


def read_shard_file(folder: Path, content: bytes) -> object:
    (folder / "0.jsonl").write_bytes(content)
    return read_shard(folder / "0.jsonl", FINGERPRINT)


@cache
def _shard_lines() -> list[Any]:
    """The lines of a shard in which one photo was converted."""
    with tempfile.TemporaryDirectory() as name:
        read_vendor_json(Path(name), json.dumps(VENDOR_A).encode())
        return [json.loads(line) for line in (Path(name) / "0.jsonl").read_bytes().splitlines()]


def read_picture(folder: Path, content: bytes) -> object:
    """Read a photo as an eval and as `bbu.infer` do: both, or neither, can."""
    path = folder / "photo.jpeg"
    path.write_bytes(content)
    photos = [Photo("photo", path), Photo("photo", content)]
    try:
        image = load_image(path, "photo")
    except DataError:
        assert not any(map(_is_readable, photos))
        raise
    assert image.mode == "RGB" and read_size(path, "photo") == image.size
    assert all(photo.load().tobytes() == image.tobytes() for photo in photos)
    return image


def _is_readable(photo: Photo) -> bool:
    try:
        photo.load()
    except DataError:
        return False
    return True


def read_jsonl(folder: Path, content: bytes) -> object:
    (folder / "val.jsonl").write_bytes(content)
    records = read_distinct_records(folder / "val.jsonl", folder)
    for _, record in records:
        assert parse_record(dump_line(record.student), "a").student == record.student
    return records


def read_predictions_file(folder: Path, content: bytes) -> object:
    path = folder / "predictions.jsonl"
    path.write_bytes(content)
    drop_cut_line(path)
    predictions = read_predictions(path)
    _assert_written_as_read(folder, predictions)
    return predictions


def _assert_written_as_read(folder: Path, predictions: list[Prediction]) -> None:
    path = folder / "again.jsonl"
    with path.open("w", encoding="utf-8") as file:
        append_predictions(file, predictions)
    assert [item.objects for item in read_predictions(path)] == [item.objects for item in predictions]


def read_answer(folder: Path, content: bytes) -> object:
    """Parse an answer; what it holds must survive the predictions file."""
    text = content.decode("utf-8", "surrogateescape" if len(content) % 2 else "replace")
    for finished in (True, False):
        answer = parse_answer(text, finished=finished, width=64, height=48)
        _assert_written_as_read(folder, [Prediction("a", answer.objects, status=answer.status)])
    return answer


def _written(folder: Path, content: bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read_run_config(folder: Path, content: bytes) -> object:
    return load_config(str(_written(folder, content, "run.yaml")))


def read_recorded_config(folder: Path, content: bytes) -> object:
    return load_recorded_config(_written(folder, content, "config.yaml"))


def read_override(folder: Path, content: bytes) -> object:
    return load_config("smoke", overrides=[content.decode("utf-8", "replace")])


def read_profile(folder: Path, content: bytes) -> object:
    return load_profile(str(_written(folder, content, "cluster.yaml")))


def read_hierarchy(folder: Path, content: bytes) -> object:
    path = _written(folder, content, "hierarchy.yaml")
    config = dataclasses.replace(_data_config(folder), label_hierarchy_file=str(path))
    return load_label_scheme(config).parse_description("螺丝连接点/BBU安装螺丝/安装正确")


def read_token_map(folder: Path, content: bytes) -> object:
    path = _written(folder, content, "tokens.yaml")
    return load_rules(dataclasses.replace(_data_config(folder), token_map_file=str(path)))


def read_manifest(folder: Path, content: bytes) -> object:
    checkpoint = folder / "checkpoint-6"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "MANIFEST.json").write_bytes(content)
    return Manifest.load(checkpoint), verify(checkpoint)


def hostile_manifest(rng: random.Random) -> bytes:
    """A damaged manifest; half of them with a checksum that is right, as a hostile writer would make it."""
    content = json.loads((OLD_RUN / "checkpoint-6/MANIFEST.json").read_bytes())
    if rng.random() < 0.5:
        return hostile_json(rng, content)
    manifest = Manifest(6, 1, "c", None, {"a": rng.choice((None, {"size": -1}, {"size": "1", "sha256": 3}))})  # type: ignore[arg-type, dict-item]
    with_other_types = dataclasses.replace(
        manifest, **{rng.choice(("step", "world_size", "files")): rng.choice((None, "6", [6], 1e300))}
    )
    return with_other_types.dumps().encode()


def read_jobs(folder: Path, content: bytes) -> object:
    (folder / "jobs.jsonl").write_bytes(content)
    return read_job_records(RunFolder(folder))


def read_run_status(folder: Path, content: bytes) -> object:
    (folder / "status.json").write_bytes(content)
    status = read_status(RunFolder(folder))
    return status.state, json.dumps(status.to_dict(), allow_nan=False).encode()


def read_metrics(folder: Path, content: bytes) -> object:
    path = folder / "eval/checkpoint-6/answer-0/metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    run = RunFolder(folder)
    scores = [*latest_scores(run), *other_scores(run), *best_scores(run).values()]
    return [(str(score), score.brief, json.dumps(score.to_dict(), allow_nan=False)) for score in scores]


def read_ledger_result(folder: Path, content: bytes) -> object:
    ledger = Ledger(folder / "ledger")
    (folder / "ledger/results/key.json").write_bytes(content)
    published = ledger.result("key")
    assert published is not None
    result = EvaluationResult.from_dict(published)
    return metrics_table(result.metrics)


def read_provenance(folder: Path, content: bytes) -> object:
    run = RunFolder(folder)
    run.provenance.write_bytes(content)
    run.config.write_text("data_root: .\nval_file: val.jsonl\n")
    settings = RunSettings.of_run(run)
    record_start(run, {}, [])
    return settings.differences({"dataset_sha256": "a"})


def read_lease(folder: Path, content: bytes) -> object:
    run = RunFolder(folder)
    for path in run.leases.glob("*"):
        path.unlink()
    run.leases.mkdir(exist_ok=True)
    (run.leases / "1").write_bytes(content)
    return take_run_lease(run, Owner.of_this_process({}), timeout_s=60)


def _json_of(*parts: str) -> Any:
    return json.loads(OLD_RUN.joinpath(*parts).read_bytes())


def _lines_of(*parts: str) -> list[Any]:
    return [json.loads(line) for line in OLD_RUN.joinpath(*parts).read_bytes().splitlines()]


def _override(rng: random.Random) -> bytes:
    key = rng.choice(("llm_lr", "seed", "response_types", "bf16", "save_steps", "run_name", "x" * 300, ""))
    return (
        key.encode()
        + rng.choice((b"=", b"=", b"==", b" = ", b""))
        + hostile_json(rng, rng.choice((1, 0.5, "abc", True, ["property"], {"a": [2]})))
    )


@cache
def readers() -> tuple[Reader, ...]:
    """All readers; the data of the old run folder is read once."""
    results = [path.relative_to(OLD_RUN).parts for path in OLD_RUN.glob("eval/ledger/results/*.json")]
    (metrics,) = (path.relative_to(OLD_RUN).parts for path in OLD_RUN.glob("eval/checkpoint-6/*/metrics.json"))
    (predictions,) = (path.relative_to(OLD_RUN).parts for path in OLD_RUN.glob("eval/checkpoint-6/*/predictions.jsonl"))
    values = {name: _json_of(*parts) for name, parts in (("metrics", metrics), ("result", results[0]))}
    status, provenance, jobs = _json_of("status.json"), _json_of("provenance.json"), _lines_of("jobs.jsonl")
    written = [PREDICTION, *_lines_of(*predictions)[:2]]
    owner = dataclasses.asdict(Owner.of_this_process({})) | {"released": False}
    photos, configs = ("JPEG", "exif", "progressive"), (CONFIG_DIR / "smoke.yaml", CONFIG_DIR / "base_flat.yaml")
    profiles = tuple((CONFIG_DIR / "clusters").glob("*.yaml"))
    labels, recorded = CONFIG_DIR / "labels", (OLD_RUN / "config.yaml",)
    return (
        Reader("vendor JSON", hostile_annotations, read_vendor_json, False, 2),
        Reader("vendor photo", partial(hostile_picture, kinds=photos), read_vendor_picture, False, 2),
        Reader("shard", partial(hostile_lines, values=_shard_lines()), read_shard_file, False),
        Reader("photo to predict on", partial(hostile_picture, kinds=(*photos, *OTHER_FORMATS)), read_picture),
        Reader("JSONL records", partial(hostile_lines, values=RECORDS), read_jsonl),
        Reader("predictions", partial(hostile_lines, values=written), read_predictions_file),
        Reader("answer", hostile_answer, read_answer, False),
        Reader("run config", partial(hostile_text_of, paths=configs), read_run_config, True, 8),
        Reader("recorded config", partial(hostile_text_of, paths=recorded), read_recorded_config, True, 8),
        Reader("override", _override, read_override, True, 8),
        Reader("cluster profile", partial(hostile_text_of, paths=profiles), read_profile, True, 4),
        Reader("label hierarchy", partial(hostile_text_of, paths=(labels / "hierarchy_zh.yaml",)), read_hierarchy),
        Reader("token map", partial(hostile_text_of, paths=(labels / "token_map_zh.yaml",)), read_token_map, True, 2),
        Reader("manifest", hostile_manifest, read_manifest),
        Reader("job records", partial(hostile_lines, values=jobs), read_jobs),
        Reader("status", partial(hostile_json, value=status), read_run_status),
        Reader("metrics", partial(hostile_json, value=values["metrics"]), read_metrics, False),
        Reader("ledger result", partial(hostile_json, value=values["result"]), read_ledger_result),
        Reader("provenance", partial(hostile_json, value=provenance), read_provenance),
        Reader("run lease", partial(hostile_json, value=owner), read_lease),
    )  # fmt: skip
