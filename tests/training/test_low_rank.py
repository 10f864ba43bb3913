"""A run that trains low-rank adapters and the head: what it saves, resumes, scores, predicts and exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.config.read import load_config
from bbu.errors import CheckpointError, ConfigError
from bbu.export import main as export
from bbu.inference import Qwen25VLInference
from bbu.models.adapters import AdapterSpec, is_adapter_name
from bbu.models.qwen import load_model
from bbu.run.checkpoints import verify
from bbu.run.folder import RunFolder
from bbu.training.arguments import training_arguments
from bbu.training.coordinator import TrainingCoordinator
from bbu.training.parameter_manager import ParameterManager
from bbu.training.preemption import StopFlag
from tests.commands import Demo, call_well
from tests.tensorboard import read_scalars

SETTINGS = (
    "lora_rank=4", "lora_dropout=0.1", "gradient_checkpointing=true", "detection_enabled=true",
    "detection_num_queries=20", "detection_hidden_dim=32", "detection_num_layers=1", "detection_num_heads=2",
    "detection_ffn_dim=32", "detection_adapter_dim=32", "detection_caption_layers=1", "detection_score_threshold=0.0",
    "detection_max_predictions=5", "collator_type=packed", "per_device_train_batch_size=1", "max_total_length=2048",
    "generation_max_new_tokens=16", "llm_lr=1e-2", "save_total_limit=0",
)  # fmt: skip
TRAINED_FILES = ("adapter_model.safetensors", "detection_head/model.safetensors")


def train(demo: Demo, folder: Path, *settings: str) -> RunFolder:
    config = load_config("smoke", overrides=[*demo.settings, f"output_root={folder}", *SETTINGS, *settings])
    coordinator = TrainingCoordinator(config, StopFlag(), {})
    assert coordinator.run() == 0
    return coordinator.run_folder


@pytest.fixture(scope="module")
def run(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(demo, tmp_path_factory.mktemp("low-rank"))


@pytest.fixture(scope="module")
def merged(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    assert export(["--checkpoint", str(run.checkpoint(6)), "--merge", str(out)]) == 0
    return out


def test_adapters_and_head_alone_train_in_five_groups(demo: Demo):
    config = load_config("smoke", overrides=[*demo.settings, *SETTINGS, "merger_lr=0"])
    spec = AdapterSpec.from_config(config.training)
    model = load_model(config.model_path, config.model, config.detection, spec)
    manager = ParameterManager(model, config.training)
    manager.freeze()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(is_adapter_name(name) or name.startswith("detection_head.") for name in trained)
    assert {name for name, _ in model.named_parameters() if name.startswith("detection_head.")} <= trained
    groups = {group["group"] for group in manager.optimizer_groups()}
    assert groups == {"vision", "llm", "detection", "adapter"}


def test_the_config_for_a_card_of_24_gb_differs_from_the_base_only_where_it_must(tmp_path: Path):
    base, config = load_config("base_flat"), load_config("one_card_24gb")
    changed = {key for key, value in config.as_flat().items() if value != getattr(base, key)}
    assert changed <= {
        "torch_dtype", "logits_chunk_size", "gradient_accumulation_steps", "vision_lr", "merger_lr", "llm_lr",
        "lora_rank", "deepspeed_enabled",
    }  # fmt: skip
    assert config.train_prompt == config.eval_prompt and config.gradient_checkpointing
    assert training_arguments(config, RunFolder(tmp_path)).bf16  # bfloat16 weights are fine where they are frozen


def test_a_run_learns_and_logs_the_norms_of_the_adapters(run: RunFolder):
    curves = read_scalars(run.root)
    losses = [curves["loss"][step] for step in sorted(curves["loss"])]
    assert sum(losses[-2:]) < sum(losses[:2])
    for group in ("vision", "merger", "llm", "detection"):
        assert all(value > 0 for value in curves[f"gn/{group}"].values())
        assert curves[f"wn/{group}"][6] != curves[f"wn/{group}"][1]


def test_a_checkpoint_holds_adapters_and_head_without_the_base_model(run: RunFolder):
    files = verify(run.checkpoint(6)).files
    assert {*TRAINED_FILES, "adapter_config.json", "optimizer.pt", "tokenizer.json"} <= files.keys()
    assert not {"model.safetensors", "config.json"} & files.keys()
    assert "low-rank adapters" in (run.checkpoint(6) / "README.md").read_text()


def test_a_resumed_run_ends_in_the_same_bits(demo: Demo, run: RunFolder, tmp_path: Path):
    shutil.copytree(run.checkpoint(3), tmp_path / run.root.name / "checkpoint-3")
    resumed = train(demo, tmp_path)
    for name in TRAINED_FILES:
        one, other = load_file(run.checkpoint(6) / name), load_file(resumed.checkpoint(6) / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ("lora_rank=8", "model_path OUT after `python -m bbu.export"),
        ("lora_rank=0", "model_path OUT after"),
        ("lora_alpha=8", "model_path OUT after"),
        ("vision_lr=0", "model_path OUT after"),
        ("optim=sgd", "checkpoint-6"),
    ],
)
def test_changes_that_the_adapters_do_not_survive_are_refused(demo: Demo, run: RunFolder, change: str, way: str):
    with pytest.raises(ConfigError, match=way):
        train(demo, run.root.parent, change, "max_steps=7")


def test_a_checkpoint_of_adapters_is_scored_and_predicts(demo: Demo, run: RunFolder):
    call_well("eval", arguments=("--checkpoint", str(run.checkpoint(6)), "--source", "head"))
    assert list(run.eval.glob("checkpoint-6/head-*/metrics.json"))


def test_the_merged_model_predicts_what_the_adapters_predict(demo: Demo, run: RunFolder, merged: Path):
    photos = sorted((demo.root / "vendor").glob("*.jpeg"))[:2]
    for source in ("answer", "head"):
        (boxes, captions), (merged_boxes, merged_captions) = (
            Qwen25VLInference(folder).predict_detection(photos, source=source) for folder in (run.checkpoint(6), merged)
        )
        assert merged_captions == captions
        for one, other in zip(boxes, merged_boxes, strict=True):
            assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=0.01)  # pixels


def test_the_merged_folder_is_a_stock_model_without_the_state_of_the_training(merged: Path):
    names = {path.name for path in merged.iterdir()}
    assert {"model.safetensors", "config.json", "detection_head", "tokenizer.json", "README.md"} <= names
    assert not {"optimizer.pt", "trainer_state.json", "adapter_config.json", "MANIFEST.json"} & names
    assert "merged into the weights" in (merged / "README.md").read_text()
    _, remarks = Qwen2_5_VLForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(remarks.values()), remarks


def test_an_export_does_not_overwrite_and_leaves_the_checkpoint_alone(run: RunFolder, merged: Path):
    for out in (merged, run.checkpoint(6) / "inside"):
        with pytest.raises(CheckpointError, match="name a"):
            export(["--checkpoint", str(run.checkpoint(6)), "--merge", str(out)])
    verify(run.checkpoint(6))


@pytest.mark.parametrize("out", [".", "../beside", "{checkpoint}/../within-the-run", "link"])
def test_an_export_goes_to_whatever_way_an_empty_folder_is_named(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if out == "link":
        (tmp_path / "target").mkdir()
        Path("link").symlink_to(tmp_path / "target")
    target = Path(out.format(checkpoint=run.checkpoint(6))).resolve()
    export(["--checkpoint", str(run.checkpoint(6)), "--merge", out.format(checkpoint=run.checkpoint(6))])
    assert (target / "model.safetensors").is_file()
    shutil.rmtree(target)


def test_a_whole_model_is_copied_without_the_state_of_its_training(demo: Demo, tmp_path: Path, capsys):
    whole = train(demo, tmp_path, "lora_rank=0", "max_steps=1", "run_name=whole").checkpoint(1)
    export(["--checkpoint", str(whole), "--merge", str(tmp_path / "out")])
    assert "a copy without the training's state" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert Qwen25VLInference(tmp_path / "out").sources == ("answer", "head", "both")
