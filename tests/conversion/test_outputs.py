"""What a conversion writes does not overwrite the vendor's photos, or itself, through links and spellings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.conversion.outputs import check_outputs
from bbu.errors import ConfigError


def config(tmp_path: Path, **changes: object) -> DataConfig:
    paths = {"vendor_dir": str(tmp_path / "vendor"), "data_root": str(tmp_path / "data")}
    for path in paths.values():
        Path(path).mkdir(exist_ok=True)
    return dataclasses.replace(load_config("smoke").data, **(paths | changes))


def test_a_folder_that_links_to_another_makes_two_names_one_file(tmp_path: Path) -> None:
    check_outputs(config(tmp_path, val_file="sub/train.jsonl"))
    (tmp_path / "data" / "sub").symlink_to(tmp_path / "data")
    with pytest.raises(ConfigError, match="val_file and train_file are one file"):
        check_outputs(config(tmp_path, val_file="sub/train.jsonl"))
    with pytest.raises(ConfigError, match=r"train_file and the conversion's own rejects\.jsonl are one file"):
        check_outputs(config(tmp_path, train_file="sub/rejects.jsonl"))


@pytest.mark.parametrize(("link", "target"), [("data/ds_rescaled", "vendor"), ("data/ds_rescaled", "vendor/deeper")])
def test_images_never_land_among_the_vendors_photos(tmp_path: Path, link: str, target: str) -> None:
    settings = config(tmp_path)
    check_outputs(settings)
    (tmp_path / "vendor" / "deeper").mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="overwrite the vendor's"):
        check_outputs(settings)


def test_images_may_lie_on_another_disk(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "ds_rescaled").symlink_to(tmp_path / "disk")
    check_outputs(settings)
