"""Every change of a vendor's folder is noticed on every path, and nothing is decoded that has not changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bbu import convert
from bbu.config.domains import DataConfig
from bbu.conversion import photo
from bbu.conversion.shards import convert_shard, merge_shards, missing_shards
from bbu.schema import SHARD_FOLDER, photos_hash_path, read_photos_hash, read_records
from tests.conversion.vendor_folder import config_of, jpeg, put, put_photo, record

NAMES = [f"S{index:02d}" for index in range(12)]
SHARDS = 3


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for name in NAMES:
        put_photo(tmp_path / "vendor", name)
    return config_of(tmp_path / "vendor", tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The photos that were decoded, in order."""
    paths: list[str] = []
    convert_photo = photo.convert_photo

    def note(vendor_photo, *arguments):
        paths.append(vendor_photo.name)
        return convert_photo(vendor_photo, *arguments)

    monkeypatch.setattr("bbu.conversion.reuse.convert_photo", note)
    return paths


def convert_all(config: DataConfig, shards: int = SHARDS) -> None:
    for shard in range(shards):
        convert_shard(config, shard, shards)
    merge_shards(config, shards)


def merge_alone(config: DataConfig) -> None:
    merge_shards(config, SHARDS)


def rerun_missing(config: DataConfig) -> None:
    """What `bbu.submit convert` does."""
    for shard in missing_shards(config, SHARDS):
        convert_shard(config, shard, SHARDS)
    merge_shards(config, SHARDS)


def convert_whole(config: DataConfig) -> None:
    convert_all(config, 1)


PATHS = pytest.mark.parametrize("run", [convert_all, merge_alone, rerun_missing, convert_whole])


def labels(config: DataConfig) -> dict[str, str]:
    records = read_records(Path(config.data_root) / "train.jsonl")
    return {Path(r.student.images[0]).stem: r.student.objects[0].desc for r in records if r.student.objects}


def published(config: DataConfig) -> dict[str, bytes]:
    root = Path(config.data_root)
    files = (path for path in root.rglob("*") if path.is_file() and SHARD_FOLDER not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def hash_of_written_photos(config: DataConfig) -> str:
    root = Path(config.data_root)
    paths = sorted(path for r in read_records(root / "train.jsonl") for path in r.student.images)
    lines = [f"{hashlib.sha256((root / path).read_bytes()).hexdigest()}  {path}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def keep_times(path: Path, content: bytes) -> None:
    """Replace the contents by others of the same size, and put the old times back."""
    facts = path.stat()
    assert len(content) == facts.st_size
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@PATHS
def test_a_repaired_json_is_converted_again(config: DataConfig, decoded: list[str], run: Callable) -> None:
    convert_all(config)
    decoded.clear()
    put(Path(config.vendor_dir), "S05.json", record("BBU品牌/中兴"))
    assert len(missing_shards(config, SHARDS)) == 1
    run(config)
    assert decoded == ["S05"] and labels(config)["S05"] == "bbu基带处理单元/中兴"
    assert missing_shards(config, SHARDS) == [] or run is convert_whole


@PATHS
def test_a_repaired_photo_is_converted_again(config: DataConfig, decoded: list[str], run: Callable) -> None:
    convert_all(config)
    decoded.clear()
    put(Path(config.vendor_dir), "S05.jpeg", jpeg("red"))
    run(config)
    assert decoded == ["S05"]
    assert read_photos_hash(Path(config.data_root) / "train.jsonl") == hash_of_written_photos(config)


@PATHS
def test_other_contents_of_the_same_size_and_time_are_noticed(config, decoded, run: Callable) -> None:
    convert_all(config)
    decoded.clear()
    keep_times(Path(config.vendor_dir) / "S05.json", record("BBU品牌/中兴"))
    run(config)
    assert decoded == ["S05"] and labels(config)["S05"] == "bbu基带处理单元/中兴"


@PATHS
def test_photos_that_come_and_go_are_noticed_alone(config: DataConfig, decoded: list[str], run: Callable) -> None:
    convert_all(config)
    decoded.clear()
    put_photo(Path(config.vendor_dir), "S00-first")
    (Path(config.vendor_dir) / "S07.json").unlink()
    (Path(config.vendor_dir) / "S07.jpeg").unlink()
    run(config)
    assert decoded == ["S00-first"] and set(labels(config)) == {*NAMES, "S00-first"} - {"S07"}


@PATHS
def test_a_rejected_photo_that_was_repaired_is_converted(config: DataConfig, decoded: list[str], run: Callable) -> None:
    put(Path(config.vendor_dir), "S05.json", record()[:-3])
    put(Path(config.vendor_dir), "S06.jpeg", jpeg()[:-300])
    (Path(config.vendor_dir) / "S07.jpeg").unlink()
    convert_all(config)
    assert set(labels(config)) == {*NAMES} - {"S05", "S06", "S07"}
    decoded.clear()
    for name in ("S05", "S06", "S07"):
        put_photo(Path(config.vendor_dir), name)
    run(config)
    assert sorted(decoded) == ["S05", "S06", "S07"] and set(labels(config)) == {*NAMES}


@PATHS
def test_a_written_photo_that_was_lost_or_changed_is_written_again(config, decoded, run: Callable) -> None:
    convert_all(config)
    before = published(config)
    decoded.clear()
    images = Path(config.data_root) / config.image_folder
    (images / "S03.jpeg").unlink()
    (images / "S04.jpeg").write_bytes(b"")
    run(config)
    assert sorted(decoded) == ["S03", "S04"] and published(config) == before


@PATHS
def test_touched_files_are_not_decoded_again(config: DataConfig, decoded: list[str], run: Callable) -> None:
    convert_all(config)
    before = published(config)
    decoded.clear()
    for folder in (Path(config.vendor_dir), Path(config.data_root) / config.image_folder):
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes())
    assert missing_shards(config, SHARDS) == []
    run(config)
    assert decoded == [] and published(config) == before


def test_a_rerun_without_changes_leaves_the_files_alone(config: DataConfig) -> None:
    convert_all(config)
    records = Path(config.data_root) / "train.jsonl"
    before = records.stat()
    rerun_missing(config)
    assert (records.stat().st_mtime_ns, records.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_another_number_of_shards_decodes_nothing_and_gives_the_same_bytes(config: DataConfig, decoded) -> None:
    convert_all(config)
    before = published(config)
    decoded.clear()
    for shards in (1, 5):
        convert_all(config, shards)
        assert published(config) == before
    assert decoded == []


def test_lost_shards_are_made_again_with_the_same_bytes(config: DataConfig) -> None:
    convert_all(config)
    folder = Path(config.data_root) / SHARD_FOLDER
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    for path in before:
        path.unlink()
    convert_all(config)
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before


@pytest.mark.parametrize("content", ["", "{}\n", "null\n", '{"fingerprint": 1}\n', None])
def test_a_damaged_shard_is_made_again(config: DataConfig, content: str | None) -> None:
    convert_all(config)
    before = published(config)
    path = next((Path(config.data_root) / SHARD_FOLDER).rglob("0.jsonl"))
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2] if content is None else content, encoding="utf-8")
    assert missing_shards(config, SHARDS) == [0]
    rerun_missing(config)
    assert published(config) == before


def test_between_a_shard_and_the_merge_no_hash_speaks_for_other_photos(config: DataConfig) -> None:
    convert_all(config)
    records, others = (Path(config.data_root) / name for name in ("train.jsonl", "of another config.jsonl"))
    before = read_photos_hash(records)
    photos_hash_path(others).write_text("0" * 64)
    put(Path(config.vendor_dir), "S05.jpeg", jpeg("red"))
    for shard in missing_shards(config, SHARDS):
        convert_shard(config, shard, SHARDS)
    assert read_photos_hash(records) is None and read_photos_hash(others) is None
    merge_shards(config, SHARDS)
    assert read_photos_hash(records) not in (None, before)


def test_a_photo_that_failed_is_tried_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bbu.conversion.reuse.convert_photo", lambda vendor_photo, *_: 1 / len(vendor_photo.name[3:]))
        convert_shard(config, 0, 1)
    assert missing_shards(config, 1) == [0]
    convert_all(config, 1)
    assert set(labels(config)) == {*NAMES} and missing_shards(config, 1) == []


def test_what_is_no_photo_or_has_another_name_is_reported(config: DataConfig, capsys: pytest.CaptureFixture) -> None:
    vendor = Path(config.vendor_dir)
    put(vendor, "S00.png")
    put(vendor, "notes/film.mp4")
    put_photo(vendor, "机房".encode("gbk"))
    (vendor / "loop").symlink_to(vendor)
    settings = [f"vendor_dir={vendor}", f"data_root={config.data_root}", "val_ratio=0", "convert_processes=1"]
    assert convert.main(["--config", "smoke", *(part for each in settings for part in ("--set", each))]) == 0
    out, err = capsys.readouterr()
    assert "files of no photo: {'.mp4': 1, '.png': 1, 'folder_listed_already': 1}" in out
    assert "1 photos are written under other names" in err and r"\\xbb\\xfa" in err
    report = json.loads((Path(config.data_root) / "conversion_report.json").read_text(encoding="utf-8"))
    assert report["files"]["renamed"] == {"机房": "\\xbb\\xfa\\xb7\\xbf.jpeg"}
    assert labels(config)["机房"] == "bbu基带处理单元/华为"
