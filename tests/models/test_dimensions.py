"""The number of parameters is computed from config.json alone: it is that of the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from bbu.config.read import load_config
from bbu.models.adapters import AdapterSpec, add_adapters, is_adapter_name
from bbu.models.detection_head import HeadSpec
from bbu.models.dimensions import (
    _TEXT_DEFAULTS,
    _VISION_DEFAULTS,
    ModelDimensions,
    count_parameters,
    read_dimensions,
)
from bbu.models.qwen import BBUModel
from bbu.run.folder import HEAD_KEY
from bbu.training.parameter_manager import ParameterManager
from tests.commands import Demo
from tests.models.qwen_3b import QWEN_3B


def count_of_model(config: Qwen2_5_VLConfig, run: str, rank: int = 0) -> dict[str, int]:
    """The parameters of each group of a model with the head of a run config, without memory for its weights.

    With a rank, those of the low-rank adapters alone.
    """
    setattr(config, HEAD_KEY, HeadSpec.from_config(load_config(run).detection).as_dict())
    with torch.device("meta"):
        model = BBUModel(config)
    if rank:
        add_adapters(model, AdapterSpec(rank, 1, 0.0, ("vision", "merger", "llm")), Path("base"))
    counts: Counter[str] = Counter()
    for entry in ParameterManager(model, load_config(run).training).parameters:
        counts[entry.group] += entry.parameter.numel() if not rank or is_adapter_name(entry.name) else 0
    return dict(counts)


def test_the_true_3b_has_as_many_parameters_as_counted():
    counts = count_parameters(ModelDimensions.from_config(QWEN_3B), load_config("base_flat").detection)
    config = Qwen2_5_VLConfig(
        vision_config=QWEN_3B["vision_config"],
        text_config={key: value for key, value in QWEN_3B.items() if key != "vision_config"},
        tie_word_embeddings=True,
    )
    assert counts == count_of_model(config, "base_flat")
    assert sum(counts.values()) == pytest.approx(3766e6, rel=1e-3)


def test_a_model_that_this_project_saved_has_as_many_parameters_as_counted(demo: Demo):
    folder = Path(demo.root) / "model"
    dimensions, detection = read_dimensions(folder), load_config("base_flat").detection
    assert dimensions is not None
    assert count_parameters(dimensions, detection) == count_of_model(
        Qwen2_5_VLConfig.from_pretrained(folder), "base_flat"
    )


def test_a_key_that_config_json_leaves_out_has_transformers_default():
    for defaults, config in ((_TEXT_DEFAULTS, Qwen2_5_VLTextConfig()), (_VISION_DEFAULTS, Qwen2_5_VLVisionConfig())):
        assert defaults == {key: getattr(config, key) for key in defaults}


def test_a_folder_without_a_config_has_no_dimensions(tmp_path: Path):
    assert read_dimensions(tmp_path) is None
