"""What a run reports while it trains: rates, the time left, and the heartbeat in status.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from bbu.config.read import load_config
from bbu.run.folder import RunFolder
from bbu.run.status import read_status
from bbu.training import metrics
from bbu.training.flops import Work
from bbu.training.metrics import ProgressCallback, StatusCallback, Throughput


class Clock:
    """Stands in for the module `time`; a test sets `now`, in seconds."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def status_callback(run: Path, interval_s: float) -> StatusCallback:
    infrastructure = dataclasses.replace(load_config("smoke").infrastructure, status_interval_s=interval_s)
    return StatusCallback(RunFolder(run), infrastructure, {"SLURM_JOB_ID": "7"})


def at_step(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, epoch=step / 10, is_world_process_zero=True)


def end_step(callback: StatusCallback, state: TrainerState) -> None:
    """Report the end of a step to a callback, which looks at the state alone."""
    callback.on_step_end(None, state, None)


def test_rates_are_over_the_time_since_the_last_ones(clock: Clock):
    throughput = Throughput(lambda work: 1000.0 * work.tokens, "cpu", peak=1e6)
    throughput.add(Work(samples=2, tokens=30, computed_tokens=40))
    throughput.add(Work(samples=2, tokens=30, computed_tokens=40))
    clock.now += 2.0
    assert throughput.rates() == pytest.approx({
        "samples_per_second": 2.0, "tokens_per_second": 30.0, "flops_per_second": 30000.0,
        "packing_efficiency": 0.75, "mfu": 0.03,
    })  # fmt: skip
    clock.now += 1.0
    assert throughput.rates()["tokens_per_second"] == 0.0


def test_without_a_known_peak_there_is_no_utilisation(clock: Clock):
    assert "mfu" not in Throughput(lambda work: 0.0, "cpu", peak=None).rates()


def test_the_heartbeat_is_written_at_most_once_an_interval(clock: Clock, tmp_path: Path):
    callback = status_callback(tmp_path, interval_s=5.0)
    callback.on_train_begin(None, at_step(0), None)
    clock.now += 4.0
    end_step(callback, at_step(1))
    assert read_status(RunFolder(tmp_path)).step == 0
    clock.now += 1.0
    end_step(callback, at_step(2))
    status = read_status(RunFolder(tmp_path))
    assert (status.phase, status.step, status.job_id, status.checkpoint_step) == ("training", 2, "7", None)
    assert status.seconds_left == pytest.approx(8 * 2.5)  # two steps took five seconds, eight are left


def test_a_checkpoint_is_reported_at_once_and_a_loss_that_is_not_finite_does_not_break_the_file(
    clock: Clock, tmp_path: Path
):
    callback = status_callback(tmp_path, interval_s=5.0)
    callback.on_train_begin(None, at_step(2), None)
    callback.on_log(None, at_step(3), None, {"loss": float("nan"), "samples_per_second": 2.0})
    callback.write_checkpoint(3)
    status = read_status(RunFolder(tmp_path))
    assert (status.checkpoint_step, status.loss, status.samples_per_second) == (3, None, 2.0)


def test_only_rank_0_writes(tmp_path: Path):
    callback = status_callback(tmp_path, interval_s=5.0)
    state = at_step(1)
    state.is_world_process_zero = False
    callback.write(state, "completed")
    assert not RunFolder(tmp_path).status.exists()


@pytest.mark.parametrize(
    ("saving", "line", "warnings"),
    [
        ({"save_steps": 0.1, "eval_strategy": "steps", "eval_steps": 0.1},
         "80 steps; checkpoint every 8 steps, validation loss every 8 steps", []),
        ({"save_strategy": "epoch", "eval_strategy": "no"},
         "80 steps; checkpoint each epoch, validation loss never", []),
        ({"save_steps": 100, "eval_strategy": "steps", "eval_steps": 80},
         "80 steps; checkpoint every 100 steps, validation loss every 80 steps",
         ["no checkpoint before the end: save_steps is 100, and the run has 80 steps"]),
    ],
)  # fmt: skip
def test_a_run_logs_when_it_saves_and_warns_of_what_never_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saving: dict, line: str, warnings: list[str]
):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **saving)
    state = TrainerState(max_steps=80)
    state.compute_steps(arguments, 80)
    with caplog.at_level("INFO"):
        ProgressCallback("lines").on_train_begin(arguments, state, TrainerControl())
    assert [r.getMessage() for r in caplog.records if r.levelname == "INFO"] == [line]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == warnings
