"""A complete training run on a tiny model: what it writes, how it resumes, how it stops and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bbu.config.read import load_config
from bbu.models.qwen import load_model
from bbu.run.checkpoints import verify
from tests.commands import ROOT, Demo, argv_of, call_well
from tests.conftest import Entry
from tests.tensorboard import read_scalars

LR_GROUPS = ("vision", "merger", "llm")
HALVES = ("save_steps=0.5", "eval_strategy=steps", "eval_steps=0.5")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = read_weights(one), read_weights(other)
    assert first.keys() == second.keys()
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    assert not unequal, unequal


def training_command(demo: Demo, out: Path, *settings: str) -> list[str]:
    """The command line of a training run that a test starts and does not wait for."""
    return argv_of("train", ("--config", "smoke"), [*demo.settings, f"output_root={out}", *settings])


@pytest.fixture(scope="module")
def finished(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six steps without interruption."""
    out = tmp_path_factory.mktemp("finished")
    call_well("train", *demo.settings, f"output_root={out}", *HALVES)
    return out / "output-smoke"


def test_a_run_leaves_its_folder_as_documented(finished: Path):
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "provenance.json", "status.json", "logs", "tensorboard", "eval", "checkpoint-3", "checkpoint-6",
    }  # fmt: skip
    assert load_config(str(finished / "config.yaml")).max_steps == 6
    status = json.loads((finished / "status.json").read_text())
    assert (status["phase"], status["step"], status["checkpoint_step"]) == ("completed", 6, 6)
    (start,) = json.loads((finished / "provenance.json").read_text())["starts"]
    assert set(start["data_sha256"]) == {"train.jsonl", "val.jsonl", "teacher.jsonl"}


def test_tensorboard_has_the_seeds_names(finished: Path):
    curves = read_scalars(finished)
    tags = {"lm_loss", "teacher_lm_loss", "student_lm_loss", "loss", "grad_norm", "eval/lm_loss"}
    tags |= {f"{kind}/{group}" for kind in ("wn", "gn", "lr") for group in LR_GROUPS}
    assert tags <= curves.keys(), tags - curves.keys()
    assert sorted(curves["lm_loss"]) == [1, 2, 3, 4, 5, 6] and sorted(curves["eval/lm_loss"]) == [3, 6]


def test_group_norms_add_up_to_the_gradient_norm_before_clipping(finished: Path):
    curves = read_scalars(finished)
    for step, total in curves["grad_norm"].items():
        groups = sum(curves[f"gn/{group}"][step] ** 2 for group in LR_GROUPS) ** 0.5
        assert groups == pytest.approx(total, rel=1e-4) and total > 1.0


def test_a_checkpoint_verifies_and_is_a_complete_model_folder(finished: Path):
    checkpoint = finished / "checkpoint-6"
    assert verify(checkpoint).step == 6
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == [
        "Qwen2_5_VLForConditionalGeneration"
    ]
    config = load_config(str(checkpoint / "run_config.yaml"))
    model = load_model(checkpoint, config.model)
    assert not torch.equal(
        model.model.language_model.layers[0].self_attn.q_proj.weight,
        load_model(config.model_path, config.model).model.language_model.layers[0].self_attn.q_proj.weight,
    )


def test_a_run_resumed_from_its_middle_ends_in_the_same_bits(finished: Path, entry: Entry, tmp_path: Path):
    run = tmp_path / "output-smoke"
    run.mkdir()
    shutil.copytree(finished / "checkpoint-3", run / "checkpoint-3")
    done = entry("train", *HALVES)
    assert done.code == 0 and "step 4/6" in done.err and "step 3/6" not in done.err, done.err
    assert "6 steps; checkpoint every 3 steps, validation loss every 3 steps" in done.err, done.err
    assert_equal_weights(finished / "checkpoint-6", run / "checkpoint-6")
    assert not torch.equal(*(read_weights(finished / f"checkpoint-{n}")["visual.merger.ln_q.weight"] for n in (3, 6)))


def test_a_damaged_newest_checkpoint_is_passed_over(finished: Path, entry: Entry, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "output-smoke")
    (tmp_path / "output-smoke/checkpoint-6/optimizer.pt").write_bytes(b"cut")
    done = entry("train")
    assert done.code == 0 and "passed over" in done.err and "step 4/6" in done.err, done.err
    assert_equal_weights(finished / "checkpoint-6", tmp_path / "output-smoke/checkpoint-6")


def test_a_finished_run_is_left_as_it_is(finished: Path, entry: Entry, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "output-smoke")
    done = entry("train")
    assert done.code == 0 and "nothing left to train" in done.err, done.err


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_a_signal_saves_the_step_and_the_same_command_resumes(
    demo: Demo, entry: Entry, tmp_path: Path, finished: Path, name: str
):
    argv = training_command(demo, tmp_path, "save_steps=100")
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while "step 2/6" not in log:
            log += (line := process.stderr.readline())
            assert line, log
        os.kill(process.pid, getattr(signal, f"SIG{name}"))
        log += process.stderr.read()
    assert process.returncode == 75 and "stop signal received" in log, log
    run = tmp_path / "output-smoke"
    assert json.loads((run / "status.json").read_text())["phase"] == "stopped"
    assert len(list(run.glob("checkpoint-*"))) == 1
    done = entry("train", "save_steps=100")
    assert done.code == 0, done.err
    assert_equal_weights(finished / "checkpoint-6", run / "checkpoint-6")


def test_a_stop_before_the_first_step_costs_nothing(demo: Demo, tmp_path: Path):
    argv = [sys.executable, "-X", "importtime", *training_command(demo, tmp_path)[1:]]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "torch.nn" not in process.stderr.readline():  # during the heavy imports
            pass
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
    assert process.returncode == 75 and "before the first step" in log
    assert not list(tmp_path.glob("output-smoke/checkpoint-*"))


def test_a_gradient_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(entry: Entry, tmp_path: Path):
    done = entry("train", "llm_lr=1e30", "vision_lr=1e30", "max_grad_norm=0.0", "save_steps=1")
    assert done.code == 6 and done.err.splitlines()[-1].startswith("error: step "), done.err
    for checkpoint in tmp_path.glob("output-smoke/checkpoint-*"):
        assert all(torch.isfinite(w).all() for w in read_weights(checkpoint).values()), checkpoint
    assert json.loads((tmp_path / "output-smoke/status.json").read_text())["phase"] == "failed"


def test_losses_do_not_depend_on_how_a_step_is_split_into_micro_batches(entry: Entry, tmp_path: Path):
    curves = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        name = f"{size}x{accumulation}"
        done = entry(
            "train", f"run_name={name}", f"per_device_train_batch_size={size}", "max_steps=3",
            f"gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        assert done.code == 0, done.err
        curves.append(read_scalars(tmp_path / f"output-{name}"))
    for curve in curves[1:]:
        for name in ("lm_loss", "student_lm_loss", "loss", "grad_norm"):
            assert curve[name] == pytest.approx(curves[0][name], rel=1e-4), name


def test_two_trainers_do_not_share_a_run_folder(demo: Demo, entry: Entry, tmp_path: Path):
    argv = training_command(demo, tmp_path, "max_steps=500")
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "step 1/500" not in process.stderr.readline():
            time.sleep(0.01)
        done = entry("train")
        process.kill()
    assert done.code == 5 and "in use by job local" in done.err, done.err
