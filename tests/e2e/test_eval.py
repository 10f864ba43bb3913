"""The eval job: scores each checkpoint once, goes on where it was interrupted, keeps what it could not predict."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, Demo, argv_of, call, call_well

pytestmark = pytest.mark.e2e

QUICK = ("generation_max_new_tokens=24", "generation_batch_size=1")


@pytest.fixture(scope="module")
def trained(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    call_well("train", *demo.settings, f"output_root={out}", *QUICK)
    return out / "output-smoke"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run folder with two checkpoints that a test may score."""
    return Path(shutil.copytree(trained, tmp_path / "output-smoke"))


def score(run: Path, *settings: str) -> str:
    return call_well("eval", *settings, arguments=("--pending", str(run))).out


def metrics(run: Path, step: int) -> dict:
    (path,) = run.glob(f"eval/checkpoint-{step}/*/metrics.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_pending_scores_every_checkpoint_once(run: Path):
    told = score(run)
    assert told.count("found with the right label at IoU 0.50") == 2 and f"run folder: {run}" in told
    before = {path: path.stat().st_mtime_ns for path in run.glob("eval/checkpoint-*/*/*")}
    assert "checkpoint-6: answer is scored already" in score(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("eval/checkpoint-*/*/*")}


def test_another_way_to_score_is_another_score(run: Path):
    score(run)
    score(run, "eval_iou_threshold=0.75")
    found = [json.loads(path.read_text()) for path in run.glob("eval/checkpoint-6/*/metrics.json")]
    assert sorted(result["headline"]["iou"] for result in found) == [0.5, 0.75]


def test_an_interrupted_worker_leaves_its_predictions_to_the_next(run: Path):
    score(run)
    whole = metrics(run, 6)
    (folder,) = run.glob("eval/checkpoint-6/*")
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    kept = json.loads(lines[1]) | {"objects": [{"bbox_2d": [1, 2, 30, 40], "desc": "kept", "score": 0.5}]}
    shutil.rmtree(run / "eval/ledger")
    (folder / "metrics.json").unlink()
    (folder / "predictions.jsonl").write_bytes(json.dumps(kept).encode() + b"\n" + lines[2] + lines[3][:20])
    score(run)
    now = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(now) == 4 and sorted(now[2:]) == sorted([lines[0], lines[3]])
    assert metrics(run, 6)["images"]["objects_predicted"] == whole["images"]["objects_predicted"] + 1


def test_workers_at_the_same_time_do_no_double_work(run: Path):
    argv = argv_of("eval", ("--pending", str(run)), ())
    workers = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    for step in (3, 6):
        (path,) = run.glob(f"eval/checkpoint-{step}/*/predictions.jsonl")
        assert len(path.read_text(encoding="utf-8").splitlines()) == 4, told
    assert len(list((run / "eval/ledger/results").iterdir())) == 2


def test_a_photo_that_cannot_be_read_counts_as_missed(run: Path, demo: Demo, tmp_path: Path):
    shutil.copytree(demo.root / "data", tmp_path / "data")
    gone = json.loads((tmp_path / "data/val.jsonl").read_text(encoding="utf-8").splitlines()[0])["images"][0]
    (tmp_path / "data" / gone).unlink()
    score(run, f"data_root={tmp_path}/data")
    images = metrics(run, 6)["images"]
    assert images["status"]["failed"] == 1 and images["total"] == 4
    assert images["objects_true"] == sum(
        len(json.loads(line)["objects"]) for line in (tmp_path / "data/val.jsonl").read_text().splitlines()
    )


def test_rotation_spares_what_has_no_score_yet(run: Path, demo: Demo):
    (run / "eval/ledger").mkdir()
    more = (*demo.settings, f"output_root={run.parent}", "max_steps=9", "save_total_limit=1")
    call_well("train", *more)
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    score(run, *QUICK)
    call_well("train", *more, "max_steps=12")
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-12"]


def test_a_damaged_checkpoint_does_not_keep_the_others_waiting(run: Path):
    (run / "checkpoint-3/model.safetensors").unlink()
    done = call("eval", arguments=("--pending", str(run)))
    assert done.code == 5 and "checkpoint-3" in done.err and "Traceback" not in done.err, done.err
    assert metrics(run, 6)["step"] == 6


def test_a_stopped_worker_gives_its_claim_back_and_another_goes_on_at_once(run: Path, tmp_path: Path):
    (cap := tmp_path / "cap").touch()
    argv = argv_of("eval", ("--pending", str(run)), ["generation_max_new_tokens=256", "max_requeues=7"])
    environ = os.environ | {"BBU_REQUEUE_CAP": str(cap)}
    with subprocess.Popen(argv, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as worker:
        while not list(run.glob("eval/ledger/claims/*")):
            assert worker.poll() is None
            time.sleep(0.02)
        worker.send_signal(signal.SIGUSR2)
        assert worker.stderr is not None
        told = worker.stderr.read()
    assert worker.returncode == 75 and "stopped by SIGUSR2" in told, told
    assert cap.read_text() == "7\n", "its job is requeued as often as its config allows"
    assert "found with the right label" in score(run, "generation_max_new_tokens=256")


def test_infer_prints_boxes_and_draws_them(run: Path, demo: Demo, tmp_path: Path):
    photo = sorted((demo.root / "vendor").glob("*.jpeg"))[0]
    arguments = (str(photo), "--checkpoint", str(run / "checkpoint-6"), "--out", str(tmp_path / "drawn"))
    done = call_well("infer", arguments=arguments)
    assert json.loads(done.out)["images"] == [str(photo)]
    assert (tmp_path / "drawn" / f"{photo.stem}.png").stat().st_size > 1000
