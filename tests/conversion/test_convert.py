"""Conversion end to end on synthetic rooms: what is kept, what is rejected, and that bytes never depend on how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bbu import convert
from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.labels import load_rules
from bbu.conversion.report import ConversionReport
from bbu.conversion.shards import convert_shard, merge_shards, missing_shards
from bbu.conversion.split import site_of
from bbu.errors import ConfigError, DataError
from bbu.schema import SHARD_FOLDER, read_photos_hash, read_records
from bbu.synthetic.rooms import write_rooms

PHOTOS = 24


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms") / "vendor"
    write_rooms(folder, PHOTOS, "small", seed=0)
    return folder


def config_for(vendor: Path, root: Path, **changes: object) -> DataConfig:
    data = load_config("smoke").data
    return dataclasses.replace(data, vendor_dir=str(vendor), data_root=str(root), convert_processes=1, **changes)


def digest(root: Path) -> dict[str, str]:
    """SHA-256 of every published file."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and SHARD_FOLDER not in p.parts)
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def convert_whole(config: DataConfig, shards: int = 1) -> ConversionReport:
    for shard in range(shards):
        convert_shard(config, shard, shards)
    return merge_shards(config, shards)


def test_every_usable_photo_is_kept_and_every_broken_one_has_a_reason(vendor: Path, tmp_path: Path) -> None:
    report = convert_whole(config_for(vendor, tmp_path))
    assert report.photos.rejected == {"broken_json": 1, "undecodable_image": 1}
    assert report.written["train.jsonl"] + report.written["val.jsonl"] == PHOTOS
    assert report.photos.dialects == {"A": PHOTOS // 2, "B": PHOTOS // 2}
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(reject["reason"] and reject["detail"] for reject in rejects)
    assert len(rejects) == 2 + sum(report.objects.rejected.values())


def test_empty_photo_is_kept_as_a_negative(vendor: Path, tmp_path: Path) -> None:
    convert_whole(config_for(vendor, tmp_path))
    records = [r for name in ("train", "val") for r in read_records(tmp_path / f"{name}.jsonl")]
    assert any(not r.student.objects and r.student.images[0].endswith("S000-00003.jpeg") for r in records)


def test_negatives_are_left_out_where_the_config_says_so(vendor: Path, tmp_path: Path) -> None:
    convert_whole(config_for(vendor, tmp_path, keep_negatives=False))
    assert all(r.student.objects for r in read_records(tmp_path / "train.jsonl"))


@pytest.mark.parametrize("shards", [3, 8])
def test_any_number_of_shards_gives_the_same_bytes(vendor: Path, tmp_path: Path, shards: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert_whole(config_for(vendor, whole))
    report = convert_whole(config_for(vendor, parts), shards)
    assert digest(whole) == digest(parts)
    files_beside_photos = 3 * 2 + 2  # records and their photos' hashes; rejects and report
    assert len(digest(whole)) == PHOTOS + files_beside_photos and report.written["val.jsonl"] > 0


def test_processes_and_reruns_give_the_same_bytes(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_whole(config)
    before = digest(tmp_path)
    convert_whole(dataclasses.replace(config, convert_processes=2))
    assert digest(tmp_path) == before


def test_each_records_file_has_a_hash_over_the_bytes_of_its_photos(vendor: Path, tmp_path: Path) -> None:
    convert_whole(config_for(vendor, tmp_path))
    for name in ("train", "val", "teacher"):
        records = tmp_path / f"{name}.jsonl"
        images = sorted(image for record in read_records(records) for image in record.student.images)
        lines = [f"{hashlib.sha256((tmp_path / image).read_bytes()).hexdigest()}  {image}\n" for image in images]
        assert images and read_photos_hash(records) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_another_jpeg_quality_gives_another_hash_under_equal_records(vendor: Path, tmp_path: Path) -> None:
    fine, coarse = tmp_path / "fine" / "val.jsonl", tmp_path / "coarse" / "val.jsonl"
    convert_whole(config_for(vendor, fine.parent, jpeg_quality=95))
    convert_whole(config_for(vendor, coarse.parent, jpeg_quality=60))
    assert fine.read_bytes() == coarse.read_bytes()
    assert read_photos_hash(fine) != read_photos_hash(coarse)


def test_shards_of_the_form_without_hashes_are_made_again(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    path = convert_shard(config, 0, 1)
    header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    outcomes = [line["outcome"] for line in lines]
    keys = ("min_pixels", "max_pixels", "jpeg_quality", "image_folder", "min_visible_ratio", "min_box_side")
    settings = {name: getattr(config, name) for name in (*keys, "remove_duplicates")}
    names = sorted(outcome["name"] for outcome in outcomes)
    rules = load_rules(config)
    old_rules = {"token_map": rules.token_map, "hierarchy": rules.scheme.hierarchy, "language": rules.language}
    old_rules |= {"response_types": rules.scheme.response_types}
    old_text = json.dumps([settings, old_rules, names], ensure_ascii=False, sort_keys=True)
    header["fingerprint"] = hashlib.sha256(old_text.encode()).hexdigest()
    old = [{"name": o["name"], "view": o["photo"] and o["photo"]["view"], "rejects": o["rejects"]} for o in outcomes]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *old]), encoding="utf-8")
    assert missing_shards(config, 1) == [0]
    with pytest.raises(DataError, match="run this shard again"):
        merge_shards(config, 1)
    convert_shard(config, 0, 1)
    assert missing_shards(config, 1) == [] and merge_shards(config, 1).photos.seen == PHOTOS + 2


def test_no_site_is_in_both_splits(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_whole(config)
    train, val = (
        {site_of(Path(r.student.images[0]).stem, config.site_pattern) for r in read_records(tmp_path / name)}
        for name in ("train.jsonl", "val.jsonl")
    )
    assert train and val and not train & val


def test_teachers_come_from_training_photos_only(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_whole(config)
    train = {r.student.images for r in read_records(tmp_path / "train.jsonl")}
    teachers = [r.student for r in read_records(tmp_path / "teacher.jsonl")]
    assert len(teachers) == config.teacher_pool_size
    assert all(teacher.images in train and teacher.objects for teacher in teachers)


def test_images_have_the_recorded_size_and_no_metadata(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_whole(config)
    for record in read_records(tmp_path / "train.jsonl"):
        with Image.open(tmp_path / record.student.images[0]) as image:
            assert image.size == (record.student.width, record.student.height)
            assert not image.getexif() and "comment" not in image.info
        assert b"Inventory Person" not in (tmp_path / record.student.images[0]).read_bytes()


def test_dirt_does_not_move_a_box(tmp_path: Path) -> None:
    """Rotation by EXIF, whichever frame the vendor annotated in, ends in the clean photo's boxes."""
    views = {}
    for dirt in (False, True):
        vendor = tmp_path / f"vendor-{dirt}"
        write_rooms(vendor, 48, "small", seed=2, dirt=dirt)
        report = convert_whole(config_for(vendor, tmp_path / f"data-{dirt}", val_ratio=0.0))
        records = read_records(tmp_path / f"data-{dirt}" / "train.jsonl")
        views[dirt] = {r.student.images[0]: r.student for r in records}
    assert report.photos.frames["stored"] > 0 and report.objects.clipped > 0
    moved = sum(
        abs(a - b) > 1
        for name, clean in views[False].items()
        if not name.endswith("-00003.jpeg")
        for one, other in zip(clean.objects, views[True][name].objects, strict=True)
        for a, b in zip(one.bbox_2d, other.bbox_2d, strict=True)
    )
    assert moved <= report.objects.clipped


def test_english_labels_come_from_the_english_texts(vendor: Path, tmp_path: Path) -> None:
    files = {"token_map_file": "token_map_en", "label_hierarchy_file": "hierarchy_en"}
    report = convert_whole(config_for(vendor, tmp_path, language="en", **files))
    assert set(report.objects.rejected) <= {"duplicate"}
    assert any(label.startswith("screw_connection_point/bbu_install_screw/installed_") for label in labels(report))


def labels(report: ConversionReport) -> list[str]:
    return list(report.objects.labels)


def test_response_types_choose_the_levels(vendor: Path, tmp_path: Path) -> None:
    report = convert_whole(config_for(vendor, tmp_path, response_types=["object_type"]))
    assert "螺丝连接点" in labels(report) and not any("/" in label for label in labels(report))


def test_a_refused_conversion_writes_its_reports_and_leaves_the_records_as_they_are(
    vendor: Path, tmp_path: Path
) -> None:
    convert_whole(config_for(vendor, tmp_path))
    names = [f"{part}.{end}" for part in ("train", "val", "teacher") for end in ("jsonl", "photos.sha256")]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / "rejects.jsonl").unlink()
    with pytest.raises(DataError, match="2 of 26 photos rejected"):
        convert_whole(config_for(vendor, tmp_path, max_reject_share=0.05, split_seed=1, response_types=["object_type"]))
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    report = json.loads((tmp_path / "conversion_report.json").read_text(encoding="utf-8"))
    assert (tmp_path / "rejects.jsonl").is_file() and report["written"] == {}


def test_a_label_file_in_the_wrong_language_is_refused_and_named(vendor: Path, tmp_path: Path) -> None:
    settings = config_for(vendor, tmp_path, label_hierarchy_file="hierarchy_en", max_reject_share=1.0)
    with pytest.raises(DataError, match=r"0 of .* objects kept.*outside hierarchy_en: '螺丝连接点' is not in"):
        convert_whole(settings)
    assert not (tmp_path / "train.jsonl").exists()


def half_turned(vendor: Path, stem: str) -> None:
    """Write a photo that EXIF turns by half, with a box on its red corner as the file stores it."""
    image = Image.new("RGB", (280, 140), "grey")
    image.paste((255, 0, 0), (0, 0, 56, 28))
    exif = Image.Exif()
    exif[274] = 3
    image.save(vendor / f"{stem}.jpeg", exif=exif)
    item = {"coordinates": [[0, 0], [56, 28]], "properties": {"标签": "BBU品牌/华为"}}
    data = {"info": {"width": 280, "height": 140}, "dataList": [item]}
    (vendor / f"{stem}.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("decided", "frame"), [(False, "upright"), (True, "stored")])
def test_photos_that_cannot_decide_their_frame_follow_the_others(
    tmp_path: Path, shards: int, decided: bool, frame: str
) -> None:
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    half_turned(vendor, "S1-1")
    half_turned(vendor, "S2-1")
    if decided:  # a quarter turn whose JSON states the stored size
        half_turned(vendor, "S3-1")
        with Image.open(vendor / "S3-1.jpeg") as image:
            image.load()
            exif = image.getexif()
            exif[274] = 6
            image.save(vendor / "S3-1.jpeg", exif=exif)
    report = convert_whole(config_for(vendor, tmp_path / "data", val_ratio=0.0), shards)
    assert (report.exif.undecided, report.exif.frame) == (2, frame)
    assert "EXIF" in report.warnings[0] and ("other photos" in report.warnings[0]) == decided
    records = {r.student.images[0]: r.student for r in read_records(tmp_path / "data/train.jsonl")}
    box = (224, 112, 280, 140) if decided else (0, 0, 56, 28)
    scale = records["ds_rescaled/S1-1.jpeg"].width / 280
    assert records["ds_rescaled/S1-1.jpeg"].objects[0].bbox_2d == pytest.approx([c * scale for c in box], abs=1)


@pytest.mark.parametrize(("exif_frame", "box"), [("stored", (224, 112, 280, 140)), ("upright", (0, 0, 56, 28))])
def test_the_config_can_decide_the_frame(tmp_path: Path, exif_frame: str, box: tuple[int, ...]) -> None:
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    half_turned(vendor, "S1-1")
    report = convert_whole(config_for(vendor, tmp_path / "data", val_ratio=0.0, exif_frame=exif_frame))
    (record,) = read_records(tmp_path / "data/train.jsonl")
    scale = record.student.width / 280
    assert record.student.objects[0].bbox_2d == pytest.approx([c * scale for c in box], abs=1)
    assert report.exif.undecided == 0 and not report.warnings


def test_merge_names_the_missing_shards(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_shard(config, 1, 3)
    with pytest.raises(DataError, match=r"shards 0, 2 of 3 are missing"):
        merge_shards(config, 3)


def test_merge_refuses_shards_of_other_settings(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_shard(config, 0, 1)
    with pytest.raises(DataError, match="other settings"):
        merge_shards(dataclasses.replace(config, jpeg_quality=50), 1)


def test_shards_of_another_vendor_folder_with_the_same_photo_names_do_not_count(vendor: Path, tmp_path: Path) -> None:
    config = config_for(vendor, tmp_path)
    convert_shard(config, 0, 1)
    other = dataclasses.replace(config, vendor_dir=str(shutil.copytree(vendor, tmp_path / "other")))
    assert missing_shards(config, 1) == [] and missing_shards(other, 1) == [0]
    with pytest.raises(DataError, match="other settings"):
        merge_shards(other, 1)


def test_entry_converts_as_an_array_with_a_merge(vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--config", "smoke", "--set", f"vendor_dir={vendor}", "--set", f"data_root={tmp_path}"]
    assert [convert.main([*common, "--shard", f"{i}/2"]) for i in range(2)] == [0, 0]
    assert convert.main([*common, "--merge", "2"]) == 0
    assert "'broken_json': 1" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["2/2", "x", "1", "-1/2"])
def test_entry_refuses_a_shard_that_does_not_exist(shard: str) -> None:
    with pytest.raises(ConfigError, match="write I/N"):
        convert.main(["--config", "smoke", f"--shard={shard}"])


def test_missing_vendor_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bbu\.demo"):
        convert_whole(config_for(tmp_path / "none", tmp_path / "data"))
