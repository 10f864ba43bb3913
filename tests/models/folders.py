"""Model folders that several tests load: the tiny model with a detection head, and one with untied embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bbu.config.domains import DetectionConfig
from bbu.config.read import load_config
from bbu.models.model_files import write_config
from bbu.models.qwen import load_model
from bbu.models.tiny import build_tiny_model

SMALL_HEAD = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=32", "detection_num_layers=1",
    "detection_num_heads=2", "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_caption_layers=1",
)  # fmt: skip
MODEL = load_config("smoke", overrides=["attn_implementation=eager"]).model


def head_config(*overrides: str) -> DetectionConfig:
    """The config of a small head."""
    return load_config("smoke", overrides=[*SMALL_HEAD, *overrides]).detection


def model_with_head(folder: Path) -> Path:
    """A model folder with a small head, as training saves it."""
    build_tiny_model(folder, seed=0)
    torch.manual_seed(1)
    load_model(folder, MODEL, head_config()).save_pretrained(folder)
    return folder


def build_untied_model(folder: Path) -> Path:
    """A tiny model whose language head has weights of its own, as the larger Qwen2.5-VL have."""
    build_tiny_model(folder, seed=0)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(2)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    write_config(folder, config, type(model).__name__)
    return folder


def copy_folder(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, target))
