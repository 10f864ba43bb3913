"""A vendor's folder with files of any name and content."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

from PIL import Image

from bbu.config.domains import DataConfig
from bbu.config.read import load_config


def jpeg(color: str = "grey") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (84, 56), color).save(data, "JPEG")
    return data.getvalue()


def record(label: str = "BBU品牌/华为", **texts: object) -> bytes:
    item = {"coordinates": [[10, 20], [50, 40]], "properties": {"标签": label, **texts}}
    data = {"info": {"width": 84, "height": 56}, "dataList": [item]}
    return json.dumps(data, ensure_ascii=False).encode()


def put(folder: Path, name: str | bytes, content: bytes = b"") -> None:
    """Write a file, with the folders above it; a name may be any bytes."""
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def put_photo(folder: Path, stem: str | bytes, color: str = "grey", label: str = "BBU品牌/华为") -> None:
    """Write a photo that can be converted: a JPEG and its JSON."""
    put(folder, os.fsencode(stem) + b".jpeg", jpeg(color))
    put(folder, os.fsencode(stem) + b".json", record(label))


def config_of(folder: Path, root: Path, **changes: object) -> DataConfig:
    """A config under which every photo of the folder goes to training."""
    settings = {"convert_processes": 1, "val_ratio": 0.0, "max_reject_share": 1.0, "teacher_pool_size": 1}
    data = load_config("smoke").data
    return dataclasses.replace(data, vendor_dir=str(folder), data_root=str(root), **(settings | changes))
