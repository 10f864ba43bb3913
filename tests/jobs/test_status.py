"""`python -m bbu.status`: what it prints about run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder
from bbu.run.status import write_status
from bbu.status import main
from tests.conftest import SlurmSays
from tests.jobs.runs import TRAINING, squeue_text, write_score


def test_a_training_run_is_shown_with_its_pace(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str]
):
    write_status(run, TRAINING)
    slurm_says("squeue", squeue_text("7 RUNNING"))
    assert main([]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["a", "training,", "RUNNING", "30/120", "0.5123", "8.25", "1:02:05", "0:00:00", "ago", "-",
                            "-", "1", "-"]  # fmt: skip


def test_scores_checkpoints_and_jobs_are_there_for_a_script(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str]
):
    slurm_says("squeue", squeue_text("7 RUNNING"))
    write_score(run, 20, "answer", 0.4)
    write_score(run, 30, "answer", 0.3)
    run.checkpoint(30).mkdir()  # without a manifest: no sound one
    main(["output-a", "--json"])
    [report] = json.loads(capsys.readouterr().out)
    assert report["scores"] == [{"step": 30, "source": "answer", "precision": 0.5, "recall": 0.5, "f1": 0.3}]
    assert report["checkpoint"] is None and report["jobs"][0]["elements"][0]["state"] == "RUNNING"


def test_compared_runs_show_where_they_differ_and_their_best_the_winner_first(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    slurm_says("squeue", "")
    other = RunFolder(tmp_path / "output-b").create()
    other.config.write_text(yaml.safe_dump({"seed": 1, "llm_lr": 2e-5, "run_name": "b"}))
    write_score(run, 10, "answer", 0.2)
    write_score(other, 10, "answer", 0.9)
    write_score(other, 20, "answer", 0.4)
    main(["--compare", "--out", "sub/table.md"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "llm_lr", "state", "step", "loss", "best", "F1"]
    assert lines[2].startswith("b") and "2e-05" in lines[2] and "answer 0.900 (step 10)" in lines[2]
    assert (tmp_path / "sub/table.md").read_text().startswith("| run")


def test_scores_on_other_photos_are_marked_and_apart(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    slurm_says("squeue", squeue_text("7 RUNNING"))
    run.config.write_text(yaml.safe_dump({"run_name": "a", "data_root": str(tmp_path), "val_file": "val.jsonl"}))
    (tmp_path / "val.jsonl").write_text("")
    write_score(run, 20, "answer", 0.4)
    write_score(run, 30, "answer", 1.0, dataset_sha256="train")
    main(["output-a"])
    out = capsys.readouterr().out
    assert "answer 0.400" in out.splitlines()[2] and "1.000" not in out.splitlines()[2]
    assert "step 30, answer: precision 0.500, recall 0.500, F1 1.000 (other val_file)" in out
    main(["output-a", "--json"])
    [report] = json.loads(capsys.readouterr().out)
    assert [score["step"] for score in report["scores"]] == [20]
    assert [(score["step"], score["differs"]) for score in report["other_scores"]] == [(30, ["val_file"])]


def test_runs_without_a_score_come_last_and_other_validation_files_have_a_column(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    slurm_says("squeue", "")
    for name, f1, dataset in (("b", None, "1" * 64), ("c", 0.1, "2" * 64)):
        other = RunFolder(tmp_path / f"output-{name}").create()
        other.config.write_text(yaml.safe_dump({"seed": 1, "llm_lr": 1e-5, "run_name": name}))
        write_score(other, 10, "answer", f1, dataset_sha256=dataset)
    write_score(run, 10, "answer", 0.0, dataset_sha256="1" * 64)
    main(["--compare"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["val", "data", "best", "F1"]
    assert [line.split()[0] for line in lines[2:]] == ["c", "a", "b"]
    assert "22222222" in lines[2] and "answer - (step 10)" in lines[4]


def test_where_there_is_no_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no output-"):
        main([])
    with pytest.raises(CheckpointError, match="not a run folder"):
        main(["."])


def test_the_name_in_the_table_is_accepted(run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str]):
    slurm_says("squeue", "")
    assert main(["a"]) == 0
    assert str(run.root) in capsys.readouterr().out


def test_a_run_with_damaged_records_does_not_hide_the_others(
    run: RunFolder, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    slurm_says("squeue", "")
    damaged = RunFolder(tmp_path / "output-damaged").create()
    damaged.jobs.write_text("{\n")
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert str(run.root) in out and err.startswith(f"bbu.status: left out: {damaged.jobs}: damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        main(["damaged"])
