"""The tiny tokenizer, the image processor, and a small data_root with real JPEGs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.config.domains import DataConfig
from bbu.config.read import load_config
from bbu.models.tiny import CORPUS, build_tokenizer

SCREW, BAFFLE = "螺丝连接点/BBU安装螺丝/安装正确", "挡风板/已安装"


def write_jpeg(path: Path, width: int = 112, height: int = 84, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, 120, 40)).save(path, quality=95)


def view(image: str, *boxes: tuple[int, int, int, int], desc: str = SCREW) -> dict[str, Any]:
    objects = [{"bbox_2d": list(box), "desc": desc} for box in boxes]
    return {"images": [image], "objects": objects, "width": 112, "height": 84}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(CORPUS)


@pytest.fixture(scope="session")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil()


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Four students and three teachers of 112x84 pixels: 4x3 placeholders each."""
    students, teachers = [f"images/s{i}.jpg" for i in range(4)], [f"images/t{i}.jpg" for i in range(3)]
    for image in students + teachers:
        write_jpeg(tmp_path / image)
    records = [view(image, (50, 40, 80, 70), (10, 10, 30, 30)) for image in students]
    write_jsonl(tmp_path / "train.jsonl", records)
    write_jsonl(tmp_path / "val.jsonl", records[:2])
    write_jsonl(tmp_path / "teacher.jsonl", [view(image, (5, 5, 20, 20), desc=BAFFLE) for image in teachers])
    return tmp_path


@pytest.fixture
def make_config(data_root: Path) -> Callable[..., DataConfig]:
    """The smoke config's data over data_root, with some keys changed."""

    def make(**changes: Any) -> DataConfig:
        settings = {
            "data_root": str(data_root), "train_file": "train.jsonl", "val_file": "val.jsonl",
            "teacher_file": "teacher.jsonl", "min_pixels": 784, "max_pixels": 28 * 28 * 64,
            "max_examples": -1, "max_eval_examples": -1, "teacher_ratio": 0.5, "num_teacher_samples": 1,
            "eval_teacher_ratio": 0.0, "language": "zh", "train_prompt": "detailed", "eval_prompt": "detailed",
            "object_order": "reading", "long_sample_policy": "refuse",
        }  # fmt: skip
        return dataclasses.replace(load_config("smoke").data, **{**settings, **changes})

    return make
