"""An untrained tiny checkpoint with a detection head, as a training publishes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from bbu.config.read import load_config
from bbu.models.qwen import load_model
from bbu.models.tiny import build_tiny_model
from bbu.run.folder import RUN_CONFIG, RunFolder
from tests.checkpoints import publishing

_SETTINGS = (
    "detection_enabled=true", "detection_num_queries=8", "detection_hidden_dim=32", "detection_num_layers=1",
    "detection_num_heads=2", "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_score_threshold=0.0",
    "detection_max_predictions=3", "generation_max_new_tokens=6", "generation_batch_size=2", "cpu_threads=1",
)  # fmt: skip


def draw_photo() -> Image.Image:
    image = Image.new("RGB", (168, 168), "grey")
    ImageDraw.Draw(image).rectangle((8, 12, 60, 70), fill="red")
    return image


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint-1` of a run; what changes it must copy it."""
    root = tmp_path_factory.mktemp("published")
    config = load_config("smoke", overrides=_SETTINGS)
    model = load_model(build_tiny_model(root / "model", seed=0), config.model, config.detection)
    run = RunFolder(root / "output-a").create()
    with publishing(run, 1) as folder:
        for path in (root / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        model.save_pretrained(folder)
        (folder / RUN_CONFIG).write_text(yaml.safe_dump(config.as_flat(), allow_unicode=True), encoding="utf-8")
    return run.checkpoint(1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three photos and a damaged one between them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.png", "d.png"):
        draw_photo().save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder
