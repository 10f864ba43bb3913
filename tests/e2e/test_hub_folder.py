"""A model folder as the hub has it goes through training, resume, eval and inference, like the tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bbu.config.read import load_config
from bbu.inference import Qwen25VLInference
from bbu.models.qwen import load_image_processor, load_model, load_tokenizer
from tests.commands import Demo, call_well
from tests.models.folders import SMALL_HEAD
from tests.models.hub_folder import build_hub_folder, hub_name

pytestmark = pytest.mark.e2e

SETTINGS = (
    *SMALL_HEAD, "collator_type=packed", "per_device_train_batch_size=1", "gradient_checkpointing=true",
    "logits_chunk_size=64", "generation_max_new_tokens=6", "detection_score_threshold=0.0",
    "detection_max_predictions=3", "detection_caption_max_length=24", "eval_bootstrap_samples=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hub_folder(tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-3B-Instruct")


@pytest.fixture(scope="module")
def run(folder: Path, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and a third after a resume."""
    out = tmp_path_factory.mktemp("run")
    settings = (*demo.settings, *SETTINGS, f"model_path={folder}", f"output_root={out}", "save_steps=2")
    call_well("train", *settings, "max_steps=2")
    resumed = call_well("train", *settings, "max_steps=3")
    assert f"resuming from {out}/output-smoke/checkpoint-2" in resumed.err + resumed.out
    return out / "output-smoke"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of all shards, by their names on the hub."""
    files = sorted(folder.glob("*.safetensors"))
    return {hub_name(name): value for path in files for name, value in load_file(path).items()}


def test_every_weight_is_loaded_as_it_lies_in_the_shards(folder: Path):
    config = load_config("smoke", overrides=["torch_dtype=bfloat16"]).model
    loaded = {hub_name(name): value for name, value in load_model(folder, config).state_dict().items()}
    assert torch.equal(loaded.pop("lm_head.weight"), loaded["model.embed_tokens.weight"])
    expected = read_weights(folder)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_the_tokens_and_pixel_limits_are_the_folders(folder: Path):
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) < config["vocab_size"]
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12845056)


def test_a_resumed_training_saves_all_weights_and_learns_in_all_parts(run: Path, folder: Path):
    before, after = read_weights(folder), read_weights(run / "checkpoint-3")
    assert after.keys() == before.keys()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name].float())}
    assert changed == {"model", "visual"} and (run / "checkpoint-3/detection_head").is_dir()


def test_a_checkpoint_keeps_the_settings_of_generation(run: Path, folder: Path):
    saved, expected = (
        json.loads((path / "generation_config.json").read_text()) for path in (run / "checkpoint-3", folder)
    )
    assert saved | {"transformers_version": ""} == expected | {"transformers_version": ""}


def test_its_checkpoint_is_scored_from_every_source(run: Path):
    call_well("eval", arguments=("--checkpoint", str(run / "checkpoint-3")))
    scores = [json.loads(path.read_text()) for path in run.glob("eval/checkpoint-3/*/metrics.json")]
    assert {score["source"] for score in scores} == {"answer", "head", "both"}


def test_its_checkpoint_answers_about_photos_until_any_of_the_folders_end_tokens(run: Path, folder: Path, demo: Demo):
    predictor = Qwen25VLInference(run / "checkpoint-3")
    boxes, captions = predictor.predict_detection(min((demo.root / "vendor").glob("*.jpeg")), source="both")
    assert len(boxes) == len(captions) == 1 and len(boxes[0]) == len(captions[0]) <= 6
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(predictor._end_tokens) == sorted(ends)
