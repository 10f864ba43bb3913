"""A resumed run: each changed key is applied, warned of or refused, and what is said is what happens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bbu.config.domains import OWNERS
from bbu.config.read import load_config, load_recorded_config
from bbu.data.dataset import BBUDataset
from bbu.errors import BBUError, CheckpointError, ConfigError, NonFiniteError
from bbu.run.checkpoints import Checkpoint, FileEntry, Manifest, verify
from bbu.run.folder import HEAD_FOLDER, RunFolder
from bbu.run.status import read_status, write_status
from bbu.training.coordinator import TrainingCoordinator
from bbu.training.preemption import StopFlag
from bbu.training.resume import _TABLE, EFFECTS, review_changes, summarise_changes
from bbu.training.trainer import BBUTrainer
from tests.commands import Demo
from tests.tensorboard import read_scalars

Train = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def train(demo: Demo) -> Train:
    """`train(folder, "max_steps=4")` trains the smoke config in this process and returns its run folder."""

    def run(folder: Path, *settings: str) -> RunFolder:
        config = load_config("smoke", overrides=[*demo.settings, f"output_root={folder}", *settings])
        coordinator = TrainingCoordinator(config, StopFlag(), {})
        coordinator.run()
        return coordinator.run_folder

    return run


@pytest.fixture(scope="module")
def three_steps(train: Train, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three steps, which have seen six of the eight samples of its first epoch."""
    return train(tmp_path_factory.mktemp("three"), "max_steps=3")


@pytest.fixture
def resumable(three_steps: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `three_steps` under tmp_path."""
    return RunFolder(Path(shutil.copytree(three_steps.root, tmp_path / three_steps.root.name)))


@pytest.fixture
def dealt(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch, sample) of each sample that training reads from now on."""
    samples: list[tuple[int, int]] = []
    read = BBUDataset.__getitem__

    def note(dataset: BBUDataset, index: int) -> Any:
        samples.append((int(dataset._epoch), index))
        return read(dataset, index)

    monkeypatch.setattr(BBUDataset, "__getitem__", note)
    return samples


def saved_checkpoint(folder: Path, *settings: str, files: tuple[str, ...] = ("optimizer.pt",)) -> Checkpoint:
    """What `review_changes` reads of a checkpoint: its recorded config and the names of its files."""
    path = folder / "checkpoint-3"
    path.mkdir(parents=True)
    (path / "run_config.yaml").write_text(yaml.safe_dump(load_config("smoke", overrides=settings).as_flat()))
    return Checkpoint(path, Manifest(3, 1, "", None, {name: FileEntry(1, "") for name in files}))


def said(checkpoint: Checkpoint, *settings: str) -> list[str]:
    changes = review_changes(checkpoint, load_config("smoke", overrides=settings))
    return [text for _, text in summarise_changes(changes)]


def test_each_key_has_one_effect():
    keys = Counter(key for _, names in _TABLE for key in names.split())
    assert keys == Counter(OWNERS.keys()) and EFFECTS.keys() == OWNERS.keys()


def test_nothing_is_said_where_nothing_has_changed(tmp_path: Path):
    assert said(saved_checkpoint(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("llm_lr=2e-3", "llm_lr: 0.001 -> 0.002: in force from the next step on"),
        ("max_steps=9", "max_steps: 6 -> 9: the rates follow the new schedule"),
        ("optim=adamw_torch_fused", "optim: 'adamw_torch' -> 'adamw_torch_fused': in force"),
        ("per_device_train_batch_size=4", "what this epoch has left is cut into new batches"),
        ("train_file=other.jsonl", "this epoch continues with those that it has not seen"),
        ("min_pixels=1568", "samples are made in another way from here on"),
        ("model_path=other", "not read: the weights come from the checkpoint"),
        ("seed=3", "not read: the random state comes from the checkpoint"),
        ("generation_batch_size=2", "changed without an effect on training: generation_batch_size"),
        ("num_train_epochs=5", "changed without an effect on training: num_train_epochs"),  # max_steps decides
        ("detection_num_queries=7", "changed without an effect on training: detection_num_queries"),  # there is no head
        ("detection_lr=0", "changed without an effect on training: detection_lr"),
        ("deepspeed_config=other.json", "changed without an effect on training: deepspeed_config"),
    ],
)
def test_a_change_is_said_with_its_effect(tmp_path: Path, change: str, words: str):
    (line,) = said(saved_checkpoint(tmp_path), change)
    assert words in line


def test_the_settings_of_adam_mean_nothing_to_another_optimizer(tmp_path: Path):
    (line,) = said(saved_checkpoint(tmp_path, "optim=sgd"), "optim=sgd", "adam_beta1=0.5")
    assert line == "changed without an effect on training: adam_beta1"


HEAD = ("detection_enabled=true",)
DEEPSPEED = ("deepspeed_enabled=true",)
ZERO_2 = ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt")
ZERO_3 = ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
ZERO_3_CONFIG = "deepspeed_config=configs/deepspeed/zero3.json"


@pytest.mark.parametrize(
    ("before", "files", "after", "words"),
    [
        ((), ("optimizer.pt",), ("vision_lr=0",), "vision_lr: 0.001 -> 0.0: this freezes"),
        (("llm_lr=0",), ("optimizer.pt",), ("llm_lr=1e-3",), "llm_lr: 0.0 -> 0.001: this unfreezes"),
        ((), ("optimizer.pt",), HEAD, "detection_enabled: False -> True"),
        (HEAD, ("optimizer.pt",), (), "detection_enabled: True -> False"),
        ((), ("optimizer.pt",), ("optim=adafactor",), "optim: 'adamw_torch' -> 'adafactor'"),
        ((), ("optimizer.pt",), DEEPSPEED, "deepspeed_enabled: False -> True"),
        (DEEPSPEED, ZERO_2, (), "deepspeed_enabled: True -> False"),
        (DEEPSPEED, ZERO_2, (*DEEPSPEED, "bf16=true"), "bf16: False -> True"),
    ],
)
def test_a_change_of_what_the_optimizer_holds_is_refused_with_the_way_to_make_it(
    tmp_path: Path, before: tuple[str, ...], files: tuple[str, ...], after: tuple[str, ...], words: str
):
    checkpoint = saved_checkpoint(tmp_path, *before, files=files)
    with pytest.raises(ConfigError) as refused:
        said(checkpoint, *after)
    assert words in str(refused.value)
    assert f"begin a new run (another run_name) with model_path {checkpoint.path}" in str(refused.value)


def test_a_head_of_another_form_begins_from_a_copy_without_the_head(tmp_path: Path):
    checkpoint = saved_checkpoint(tmp_path, *HEAD)
    with pytest.raises(ConfigError, match=f"with model_path a copy of .*checkpoint-3 without its {HEAD_FOLDER} folder"):
        said(checkpoint, *HEAD, "detection_num_queries=50")


def test_all_refusals_come_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        said(saved_checkpoint(tmp_path), "vision_lr=0", "optim=sgd", "llm_lr=2e-3")
    assert [finding.partition(":")[0] for finding in refused.value.findings] == ["vision_lr", "optim"]


@pytest.mark.parametrize(
    ("files", "after", "words"),
    [
        (ZERO_2, (*DEEPSPEED, ZERO_3_CONFIG), "saved by ZeRO-1 or ZeRO-2 and cannot be read by ZeRO-3"),
        (ZERO_3, DEEPSPEED, "saved by ZeRO-3 and cannot be read by ZeRO-1 or ZeRO-2"),
        ((), DEEPSPEED, "saved by nobody"),
    ],
)
def test_the_state_of_another_stage_of_zero_is_refused(tmp_path: Path, files: Any, after: tuple[str, ...], words: str):
    checkpoint = saved_checkpoint(tmp_path, *DEEPSPEED, files=files)
    with pytest.raises(CheckpointError, match=words):
        said(checkpoint, *after)


SCHEDULE = (
    "llm_lr=2e-3", "weight_decay=0.5", "adam_beta1=0.8", "adam_beta2=0.99", "adam_epsilon=1e-6", "max_steps=5",
    "lr_scheduler_type=linear", "warmup_steps=2", "auto_scale_lr=true", "lr_reference_batch_size=4", "save_steps=5",
)  # fmt: skip


def group_options(checkpoint: Path) -> list[dict[str, Any]]:
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def test_rates_and_decay_are_those_of_a_run_that_had_the_config_from_the_start(
    train: Train, resumable: RunFolder, tmp_path: Path
):
    train(tmp_path, *SCHEDULE)
    reference = train(tmp_path / "reference", *SCHEDULE)
    curves, expected = read_scalars(resumable.root), read_scalars(reference.root)
    for group in ("llm", "vision", "merger"):
        for step in (4, 5):
            assert curves[f"lr/{group}"][step] == pytest.approx(expected[f"lr/{group}"][step], rel=1e-6)
    last, expected_last = resumable.checkpoint(5), reference.checkpoint(5)
    assert group_options(last) == group_options(expected_last)
    states = [torch.load(path / "scheduler.pt", weights_only=True) for path in (last, expected_last)]
    assert states[0] == states[1]
    assert resumable.steps() == [3, 5]  # by the new save_steps
    assert (
        load_recorded_config(resumable.config).llm_lr == load_recorded_config(last / "run_config.yaml").llm_lr == 2e-3
    )


def test_the_log_states_the_rate_of_the_step_and_not_of_the_next(three_steps: RunFolder):
    rates = read_scalars(three_steps.root)["lr/llm"]
    assert rates[1] == 0.0 or rates[1] == pytest.approx(1e-3)
    assert rates[3] > 0  # the schedule is at 0 only after the last step


ORDERS = {
    "batch size": ("per_device_train_batch_size=4",),
    "accumulation": ("per_device_train_batch_size=1", "gradient_accumulation_steps=3"),
    "packed": ("collator_type=packed", "per_device_train_batch_size=1", "max_total_length=3000"),
    "seed": ("data_seed=3",),
    "nothing": (),
}


@pytest.mark.parametrize("settings", ORDERS.values(), ids=ORDERS)
def test_an_epoch_deals_each_sample_once_whatever_changes_in_its_middle(
    train: Train, resumable: RunFolder, dealt: list[tuple[int, int]], tmp_path: Path, settings: tuple[str, ...]
):
    seen = json.loads((resumable.checkpoint(3) / "data_position.json").read_text())["seen"]
    assert len(set(seen)) == 6
    train(tmp_path, "max_steps=-1", "num_train_epochs=2", *settings)
    first = [index for epoch, index in dealt if epoch == 0]
    assert len(first) == 2 and sorted(index for epoch, index in dealt if epoch == 1) == list(range(8))
    records = [json.loads(line) for line in data_records(resumable)]
    assert {records[index]["images"][0] for index in first} == {r["images"][0] for r in records} - set(seen)


def data_records(run: RunFolder) -> list[str]:
    config = load_recorded_config(run.config)
    return (Path(config.data_root) / config.train_file).read_text(encoding="utf-8").splitlines()


def test_the_steps_after_a_new_cut_end_with_the_schedule(train: Train, resumable: RunFolder, tmp_path: Path):
    train(tmp_path, "max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=4")
    status = json.loads(resumable.status.read_text())
    assert (status["phase"], status["step"], status["max_steps"]) == ("completed", 6, 6)  # 3 + 1 + 2
    assert status["epoch"] == 2.0


def test_resume_never_is_refused_where_there_are_checkpoints(train: Train, resumable: RunFolder, tmp_path: Path):
    with pytest.raises(
        CheckpointError, match="resume is never, but the folder has checkpoints up to step 3; set resume"
    ):
        train(tmp_path, "resume=never")


def test_a_refused_change_leaves_the_record_of_the_run_as_it_was(train: Train, resumable: RunFolder, tmp_path: Path):
    before = resumable.config.read_text()
    write_status(resumable, dataclasses.replace(read_status(resumable), phase="stopped"))
    with pytest.raises(ConfigError, match="vision_lr"):
        train(tmp_path, "vision_lr=0", "llm_lr=2e-3", "max_steps=9")
    assert resumable.config.read_text() == before
    status = json.loads(resumable.status.read_text())
    assert (status["phase"], status["step"], status["checkpoint_step"]) == ("failed to start", 3, 3)
    assert status["reason"].startswith("vision_lr: 0.001 -> 0.0")


def test_a_completed_run_stays_so_when_a_later_start_is_refused(train: Train, resumable: RunFolder, tmp_path: Path):
    with pytest.raises(ConfigError, match="vision_lr"):
        train(tmp_path, "vision_lr=0", "max_steps=9")
    assert read_status(resumable).phase == "completed"


def test_a_run_shortened_below_its_newest_checkpoint_says_so(
    train: Train, resumable: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before = resumable.config.read_text()
    train(tmp_path, "max_steps=2")
    assert "now end the run at step 2, before its newest checkpoint" in caplog.text
    assert resumable.config.read_text() == before and resumable.steps() == [3]


def test_a_start_that_fails_is_recorded_and_begins_no_run(train: Train, tmp_path: Path):
    with pytest.raises(BBUError):
        train(tmp_path, "train_file=none.jsonl")
    run = RunFolder.of(tmp_path, "smoke")
    status = json.loads(run.status.read_text())
    assert status["phase"] == "failed to start" and "none.jsonl" in status["reason"]
    assert not run.config.exists() and not run.steps()


def test_prompts_that_differ_are_warned_of(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path, "max_steps=1", "train_prompt=detailed")
    (warning,) = [record.getMessage() for record in caplog.records if "eval_prompt" in record.getMessage()]
    assert "train_prompt is detailed but eval_prompt is concise" in warning


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A weight becomes NaN after the gradients were checked, just before a checkpoint is saved."""
    save = BBUTrainer._save_checkpoint

    def poison(trainer: BBUTrainer, *args: Any) -> None:
        trainer.model.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")  # type: ignore
        save(trainer, *args)

    monkeypatch.setattr(BBUTrainer, "_save_checkpoint", poison)
    return None


@pytest.mark.usefixtures("poisoned")
def test_a_weight_that_is_not_finite_is_published_by_no_checkpoint(train: Train, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"step 1: .*up_proj.weight is NaN or infinite, so this step is not saved"):
        train(tmp_path, "max_steps=1")
    run = RunFolder.of(tmp_path, "smoke")
    assert run.steps() == [] and json.loads(run.status.read_text())["phase"] == "failed"


def rot(checkpoint: Path) -> None:
    """Leave what a bad disk leaves of a checkpoint."""
    for name in ("MANIFEST.json", "config.json", "model.safetensors"):
        (checkpoint / name).write_bytes(b"\xff{")


def test_an_old_checkpoint_that_has_rotted_ends_no_training(
    train: Train, resumable: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(resumable.checkpoint(3), resumable.checkpoint(2))
    (resumable.eval / "ledger" / "claims").mkdir(parents=True)
    (resumable.eval / "ledger" / "claims" / "key.1").write_bytes(b"\xff")
    rot(resumable.checkpoint(2))
    train(tmp_path, "max_steps=5", "save_steps=1", "save_total_limit=1")
    assert verify(resumable.checkpoint(5)).step == 5 and "a claim of an eval is passed over" in caplog.text
