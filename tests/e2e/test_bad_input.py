"""Bad input is refused in one line without a traceback, and no good work is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.commands import ROOT, Demo, Finished
from tests.conftest import Entry


def assert_refused(done: Finished, code: int, *words: str) -> None:
    """Check the exit code, and that the only error line is the last one and holds all the words."""
    last = done.err.strip().splitlines()[-1]
    assert done.code == code, done.err
    assert "Traceback" not in done.err and last.startswith("error: "), done.err
    assert done.err.count("error: ") == 1 and all(word in last for word in words), done.err


@pytest.fixture
def data(demo: Demo, tmp_path: Path) -> Path:
    """A copy of the converted data that a test may damage."""
    shutil.copytree(demo.root / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def change_record(data: Path) -> Callable[..., None]:
    """`change_record(function)` applies a function to the first training record."""

    def rewrite(change: Callable[[dict], None]) -> None:
        lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[0])
        change(record)
        text = "\n".join([json.dumps(record, ensure_ascii=False), *lines[1:]]) + "\n"
        (data / "train.jsonl").write_text(text, encoding="utf-8")

    return rewrite


def changed_config(tmp_path: Path, change: Callable[[dict], object]) -> tuple[str, ...]:
    """Arguments that name a changed copy of the smoke config."""
    values = yaml.safe_load((ROOT / "configs/smoke.yaml").read_text(encoding="utf-8"))
    change(values)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return ("--config", str(tmp_path / "changed.yaml"))


def test_a_missing_key(entry: Entry, tmp_path: Path):
    config = changed_config(tmp_path, lambda values: values.pop("nan_policy"))
    assert_refused(entry("train", arguments=config), 2, "missing key 'nan_policy'", "changed.yaml")


def test_an_unknown_key(entry: Entry, tmp_path: Path):
    config = changed_config(tmp_path, lambda values: values.update(vison_lr=1e-5))
    assert_refused(entry("train", arguments=config), 2, "unknown key 'vison_lr'", "did you mean 'vision_lr'")


def test_a_value_of_the_wrong_type(entry: Entry):
    assert_refused(entry("train", "save_steps=often"), 2, "save_steps", "must be a number", "'often'")


def test_a_missing_model_folder(entry: Entry, tmp_path: Path):
    assert_refused(entry("train", f"model_path={tmp_path}/none"), 4, "no such model folder", "model_path")


def test_an_image_outside_data_root(entry: Entry, data: Path, change_record: Callable):
    change_record(lambda record: record.update(images=["../secret.jpeg"]))
    assert_refused(entry("train", f"data_root={data}"), 3, "train.jsonl:1", "outside data_root")


def test_an_image_that_is_not_there(entry: Entry, data: Path, change_record: Callable):
    change_record(lambda record: record.update(images=["ds_rescaled/none.jpeg"]))
    assert_refused(entry("train", f"data_root={data}"), 3, "ds_rescaled/none.jpeg")


def test_a_box_outside_the_image(entry: Entry, data: Path, change_record: Callable):
    change_record(lambda record: record["objects"].append({"bbox_2d": [0, 0, 9999, 5], "desc": "标签贴纸"}))
    assert_refused(entry("train", f"data_root={data}"), 3, "train.jsonl:1", "9999", "leaves the")


def test_a_record_with_nan(entry: Entry, data: Path):
    text = (data / "train.jsonl").read_text(encoding="utf-8")
    (data / "train.jsonl").write_text(text.replace('"bbox_2d": [', '"bbox_2d": [NaN, ', 1), encoding="utf-8")
    assert_refused(entry("train", f"data_root={data}"), 3, "train.jsonl:", "NaN")


def test_a_truncated_photo_read_during_training(entry: Entry, data: Path):
    for path in data.glob("ds_rescaled/*.jpeg"):
        path.write_bytes(path.read_bytes()[:-200])
    assert_refused(entry("train", f"data_root={data}"), 3, "cannot decode", ".jpeg")


def test_a_photo_whose_patches_do_not_fit_its_placeholders(entry: Entry, data: Path):
    for path in data.glob("ds_rescaled/*.jpeg"):  # 28 pixels wider than the record says: a column of placeholders
        with Image.open(path) as image:
            wider = image.resize((image.width + 28, image.height))
        wider.save(path)
    assert_refused(entry("train", f"data_root={data}"), 3, "pixels but the record says", "convert again")


def test_broken_vendor_files_are_rejected_with_their_reasons_and_the_rest_is_converted(
    entry: Entry, demo: Demo, tmp_path: Path
):
    vendor = tmp_path / "vendor"
    shutil.copytree(demo.root / "vendor", vendor)
    pictures, texts = sorted(vendor.glob("*.jpeg")), sorted(vendor.glob("*.json"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:2000])
    texts[1].write_text(texts[1].read_text(encoding="utf-8")[:100], encoding="utf-8")
    texts[2].write_text(texts[2].read_text(encoding="utf-8").replace('"width": ', '"width": NaN, "w": ', 1))
    paths = (f"vendor_dir={vendor}", f"data_root={tmp_path}/out")
    done = entry("convert", *paths)
    assert done.code == 0, done.err
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {r["photo"]: r["reason"] for r in rejects} == {
        pictures[0].stem: "undecodable_image", texts[1].stem: "broken_json", texts[2].stem: "non_finite_number",
    }  # fmt: skip
    converted = sum(len((tmp_path / "out" / name).read_text().splitlines()) for name in ("train.jsonl", "val.jsonl"))
    assert converted == len(pictures) - 3
    assert_refused(entry("convert", *paths, "max_reject_share=0.1"), 3, "rejected")


def test_a_head_too_small_for_the_photos(entry: Entry):
    done = entry("train", "detection_enabled=true", "detection_num_queries=1")
    assert_refused(done, 2, "train.jsonl[", "objects but detection_num_queries is 1")
    done = entry("train", "detection_enabled=true", "detection_caption_max_length=3")
    assert_refused(done, 2, "tokens but detection_caption_max_length is 3")


def test_a_folder_that_is_not_a_checkpoint(entry: Entry, tmp_path: Path):
    assert_refused(entry("eval", arguments=("--checkpoint", str(tmp_path))), 5, "not a checkpoint")
    assert_refused(entry("eval", arguments=("--pending", str(tmp_path))), 5, "not a run folder")
