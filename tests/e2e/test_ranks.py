"""Two ranks on this machine train what one rank trains, by DDP and by DeepSpeed's ZeRO-2, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.run.checkpoints import verify
from tests.commands import Demo, Finished, call
from tests.tensorboard import read_scalars

pytestmark = pytest.mark.e2e

COMPARED = ("lm_loss", "teacher_lm_loss", "student_lm_loss", "loss", "grad_norm", "gn/llm", "gn/vision", "wn/llm")
TOLERANCE = 2e-4
"""Relative: ranks add in another order, and six Adam steps enlarge the difference in rounding."""


HERE = ("--config", "smoke", "--cluster", "local")
"""On this machine, whether or not it has Slurm."""


def read_shapes(file: Path) -> dict[str, torch.Size]:
    """The shape of each weight by its name."""
    return {name: weight.shape for name, weight in load_file(file).items()}


def train(demo: Demo, out: Path, name: str, *settings: str, ranks: int) -> Finished:
    place = [*demo.settings, f"output_root={out}", f"run_name={name}"]
    done = call("submit", *place, *settings, arguments=(*HERE, "--nodes", str(ranks)), cwd=out)
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one_rank(demo: Demo, out: Path) -> dict[str, dict[int, float]]:
    train(demo, out, "one", "per_device_train_batch_size=4", ranks=1)
    return read_scalars(out / "output-one")


@pytest.mark.parametrize("deepspeed", ["false", "true"], ids=["ddp", "zero2"])
def test_two_ranks_give_the_curve_of_one(demo: Demo, out: Path, one_rank: dict, deepspeed: str):
    name = f"deepspeed-{deepspeed}"
    train(demo, out, name, f"deepspeed_enabled={deepspeed}", ranks=2)
    curve = read_scalars(out / f"output-{name}")
    for tag in COMPARED:
        assert curve[tag] == pytest.approx(one_rank[tag], rel=TOLERANCE), tag
    assert verify(out / f"output-{name}/checkpoint-6").world_size == 2


HEAD = (
    "detection_enabled=true", "detection_num_queries=20", "detection_hidden_dim=64", "detection_num_layers=2",
    "detection_num_heads=4", "detection_ffn_dim=64", "detection_adapter_dim=64", "detection_dropout=0.0",
    "detection_caption_dropout=0.0", "max_grad_norm=0.5",
)  # fmt: skip
HEAD_COMPARED = ("bbox_l1_loss", "bbox_giou_loss", "objectness_loss", "caption_loss", "gn/detection", "gn/adapter")


FIRST_STEP = ("save_steps=1", "save_total_limit=0", "warmup_steps=1")
"""The rate of the first step is 0, so that checkpoint-1 holds the head as it was drawn."""
HEAD_WEIGHTS = "detection_head/model.safetensors"
WAYS = {
    "ddp": ("logits_chunk_size=16",),
    "zero2": ("deepspeed_enabled=true", "logits_chunk_size=16"),
    "offload": ("deepspeed_enabled=true", "deepspeed_config=configs/deepspeed/zero2_offload.json"),
    "zero3": ("deepspeed_enabled=true", "deepspeed_config=configs/deepspeed/zero3.json"),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_give_the_curve_of_one_with_the_detection_head(demo: Demo, out: Path, way: str):
    """Without denoising queries, whose noise is each rank's own; chunks of logits change nothing."""
    if not (out / "output-head-one").exists():
        train(demo, out, "head-one", *HEAD, *FIRST_STEP, "per_device_train_batch_size=4", ranks=1)
    name = f"head-{way}"
    train(demo, out, name, *HEAD, *FIRST_STEP, *WAYS[way], ranks=2)
    one, two = read_scalars(out / "output-head-one"), read_scalars(out / f"output-{name}")
    for tag in (*COMPARED, *HEAD_COMPARED):
        assert two[tag] == pytest.approx(one[tag], rel=TOLERANCE), tag
    assert_same_files(out / f"output-{name}/checkpoint-6", out / "output-head-one/checkpoint-6")
    heads = [load_file(out / f"output-{run}/checkpoint-1/{HEAD_WEIGHTS}") for run in ("head-one", name)]
    assert all(torch.equal(weight, heads[1][key]) for key, weight in heads[0].items()), "not drawn alike"


def assert_same_files(checkpoint: Path, other: Path) -> None:
    """Check that two checkpoints hold the same weights in the same files, and that strict loaders take the first."""
    names = ("model.safetensors", HEAD_WEIGHTS)
    assert {"README.md", "detection_head/config.json", *names} <= verify(checkpoint).files.keys()
    for name in names:
        assert read_shapes(checkpoint / name) == read_shapes(other / name)
    _, remarks = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(remarks.values()), remarks


LOW_RANK = ("lora_rank=4", "gradient_checkpointing=true")


def test_two_ranks_give_the_curve_of_one_with_adapters(demo: Demo, out: Path):
    """By DDP and by ZeRO-2, whose saved states leave out the base model."""
    train(demo, out, "low-rank-one", *HEAD, *LOW_RANK, "per_device_train_batch_size=4", ranks=1)
    train(demo, out, "low-rank-ddp", *HEAD, *LOW_RANK, ranks=2)
    train(demo, out, "low-rank-zero2", *HEAD, *LOW_RANK, "deepspeed_enabled=true", ranks=2)
    one = read_scalars(out / "output-low-rank-one")
    for way in ("ddp", "zero2"):
        two = read_scalars(out / f"output-low-rank-{way}")
        for tag in (*COMPARED, *HEAD_COMPARED):
            assert two[tag] == pytest.approx(one[tag], rel=TOLERANCE), (way, tag)
    (state,) = (out / "output-low-rank-zero2/checkpoint-3").glob("*/*model_states.pt")
    assert state.stat().st_size < 4 * 2**20  # the base model alone has 10 MB


def test_packed_rows_over_two_ranks(demo: Demo, out: Path):
    packed = ("collator_type=packed", "per_device_train_batch_size=1", "max_total_length=2048", "eval_strategy=steps")
    train(demo, out, "packed", *HEAD, *packed, "eval_steps=3", ranks=2)
    curve = read_scalars(out / "output-packed")
    assert {"lm_loss", "caption_loss", "eval/lm_loss", "eval/bbox_giou_loss", "packing_efficiency"} <= curve.keys()
    assert all(0 < value <= 1 for value in curve["packing_efficiency"].values())


def test_zero2_resumes_with_the_optimizer_state_of_every_rank(demo: Demo, out: Path, one_rank: dict):
    name, run = "resumed", out / "output-resumed"
    train(demo, out, name, "deepspeed_enabled=true", ranks=2)
    shutil.rmtree(run / "checkpoint-6")
    done = train(demo, out, name, "deepspeed_enabled=true", ranks=2)
    assert "resuming from" in done.out and "step 4/6" in done.out and "step 3/6" not in done.out, done.out
    assert read_scalars(run)["lm_loss"] == pytest.approx(one_rank["lm_loss"], rel=TOLERANCE)


def test_zero2_resumed_under_a_changed_config_takes_its_rates_from_that(demo: Demo, out: Path, one_rank: dict):
    """DeepSpeed's own checkpoint holds the old rates, and the old limit of the gradient norm."""
    name, run = "changed", out / "output-changed"
    train(demo, out, name, "deepspeed_enabled=true", "max_steps=3", ranks=2)
    done = train(demo, out, name, "deepspeed_enabled=true", "llm_lr=2e-3", "max_grad_norm=0.5", ranks=2)
    assert "llm_lr: 0.001 -> 0.002: in force from the next step on" in done.out, done.out
    rates = read_scalars(run)
    for step in (4, 5, 6):
        assert rates["lr/llm"][step] == pytest.approx(2 * one_rank["lr/llm"][step])
        assert rates["lr/vision"][step] == pytest.approx(one_rank["lr/vision"][step])


def test_fewer_ranks_continue_the_epoch_with_the_samples_that_it_has_not_seen(demo: Demo, out: Path):
    train(demo, out, "ranks", "max_steps=3", ranks=2)
    done = train(demo, out, "ranks", "max_steps=5", ranks=1)
    assert "epoch 2 continues under another cut of the data: 4 of 8 samples have been seen" in done.out, done.out


def test_deepspeed_in_bfloat16_stops_at_a_gradient_that_is_not_finite(demo: Demo, tmp_path: Path):
    """DeepSpeed alone would skip such a step and continue without a message."""
    wild = ("deepspeed_enabled=true", "bf16=true", "llm_lr=1e30", "vision_lr=1e30", "max_grad_norm=0.0")
    done = call("train", *demo.settings, f"output_root={tmp_path}", *wild)
    assert done.code == 6 and "a gradient is NaN or infinite" in done.err, done.err[-3000:]


def test_zero_does_not_resume_with_another_number_of_ranks(demo: Demo, out: Path, one_rank: dict):
    train(demo, out, "fewer", "deepspeed_enabled=true", "max_steps=3", ranks=2)
    where = [*demo.settings, f"output_root={out}", "run_name=fewer", "deepspeed_enabled=true"]
    done = call("train", *where)
    assert done.code == 5 and "saved by 2 ranks under DeepSpeed" in done.err, done.err[-3000:]


def test_a_rank_that_refuses_ends_all_ranks_with_its_code(demo: Demo, out: Path, tmp_path: Path):
    shutil.copytree(demo.root / "data", tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").write_text('{"images": ["../x"], "objects": []}\n', encoding="utf-8")
    where = [*demo.settings, f"output_root={tmp_path}", f"data_root={tmp_path}/data"]
    done = call("submit", *where, arguments=(*HERE, "--nodes", "2"), cwd=tmp_path)
    assert done.code == 3 and "outside data_root" in done.out and "Traceback" not in done.out, done.out
    assert json.loads((tmp_path / "output-smoke/provenance.json").read_text())["starts"]
