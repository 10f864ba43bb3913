"""The model card: metadata as the hub reads them, the run's facts, and the same card for the same training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bbu.config.read import load_config
from bbu.reports.base_model import BaseModel
from bbu.reports.model_card import CardFacts, gather_card_facts, write_model_card
from bbu.run.folder import RunFolder
from bbu.run.provenance import record_start

BASE = BaseModel("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", {"license": "apache-2.0"}, {})
RECORD = {"images": ["a.jpeg"], "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": 'a "bbox_2d" | b'}] * 2}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


@pytest.fixture
def facts(run: RunFolder, tmp_path: Path) -> CardFacts:
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n")
    (tmp_path / "train.photos.sha256").write_text("ab" * 32)
    (tmp_path / "val.jsonl").write_text('{"images": ["b.jpeg"], "objects": []}\n')
    config = load_config("smoke", overrides=[f"data_root={tmp_path}", f"model_path={tmp_path}"])
    environ = {"BBU_COMMIT": "c0ffee", "BBU_IMAGE_DIGEST": "1mage", "SLURM_JOB_ID": "77"}
    record_start(run, environ, [tmp_path / "train.jsonl"])
    return replace(gather_card_facts(run, config, world_size=16), base=BASE)


def write_card(tmp_path: Path, facts: CardFacts, run: RunFolder, name: str = "checkpoint-7") -> str:
    folder = tmp_path / "staged" / name
    folder.mkdir(parents=True)
    history = [
        {"step": 5, "eval/lm_loss": 9.5},
        {"step": 7, "loss": 1.5},
        {"step": 7, "eval/lm_loss": 0.25, "epoch": 1},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_model_card(folder, 7, facts, run)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_its_metadata(tmp_path: Path, facts: CardFacts, run: RunFolder):
    data = ModelCard(write_card(tmp_path, facts, run)).data.to_dict()
    assert data == {
        "base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "language": ["zh"], "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "image-text-to-text",
        "tags": ["bbu", "qwen2_5_vl", "object-detection"],
    }  # fmt: skip


def test_it_counts_and_names_the_data(tmp_path: Path, facts: CardFacts, run: RunFolder):
    assert [(file.name, file.records, file.objects) for file in facts.data] == [
        ("train.jsonl", 2, 4),
        ("val.jsonl", 1, 0),
    ]
    card = write_card(tmp_path, facts, run)
    train, val = facts.data
    assert f"| train.jsonl | 2 | 4 | {train.sha256} | {'ab' * 32} |" in card and train.sha256
    assert val.sha256 is None and "| val.jsonl | 1 | 0 | not taken | not taken |" in card


def test_it_states_code_image_settings_and_licence(tmp_path: Path, facts: CardFacts, run: RunFolder):
    card = write_card(tmp_path, facts, run)
    for words in (
        "| code, commit | c0ffee |", f"| code, SHA-256 of the sources | {facts.start.code_sha256} |",
        "| container image, SHA-256 | 1mage |", "| ranks | 16 |", "| llm_lr | 0.001 |", "| eval_prompt | ",
        '| response_types | ["object_type", "property", "extra_info"] |', "whose licence is apache-2.0",
        'Qwen25VLInference("checkpoint-7")', "Qwen2_5_VLForConditionalGeneration",
    ):  # fmt: skip
        assert words in card, words


def test_its_scores_are_those_known_when_it_is_saved(tmp_path: Path, facts: CardFacts, run: RunFolder):
    assert "- validation, eval/lm_loss: 0.2500" in (card := write_card(tmp_path, facts, run))
    assert "9.5" not in card and "earlier checkpoint" not in card and "eval/checkpoint-7/*/metrics.json" in card
    path = run.evaluations(5) / "answer-abc" / "metrics.json"
    path.parent.mkdir(parents=True)
    headline = {"iou": 0.5, "precision": 0.5, "recall": 0.25, "f1": 0.333}
    path.write_text(json.dumps({"step": 5, "headline": headline}))
    assert "- earlier checkpoint, step 5, answer: precision 0.500" in write_card(tmp_path / "scored", facts, run)


def test_a_damaged_score_does_not_stop_a_save(tmp_path: Path, facts: CardFacts, run: RunFolder):
    path = run.evaluations(5) / "answer-abc" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert "## Scores" in write_card(tmp_path, facts, run)


def test_the_same_training_writes_the_same_card_at_any_place_and_time(tmp_path: Path, facts: CardFacts, run: RunFolder):
    later = replace(facts, start=replace(facts.start, started="another day", job={"SLURM_JOB_ID": "78", "host": "n2"}))
    card = write_card(tmp_path, facts, run)
    assert write_card(tmp_path / "later", later, run) == card
    assert str(tmp_path) not in card and facts.start.job["host"] not in card


def test_names_of_people_do_not_break_its_tables(tmp_path: Path, facts: CardFacts, run: RunFolder):
    card = write_card(
        tmp_path, replace(facts, base=replace(BASE, name="a | b\n# c", licence={"license": "unknown"})), run
    )
    assert "a \\| b # c, fine-tuned by" in card and "states no licence" in card


def test_the_licence_of_the_base_travels_with_the_weights(tmp_path: Path, facts: CardFacts, run: RunFolder):
    write_card(tmp_path, replace(facts, base=replace(BASE, licence_files={"LICENSE": b"text"})), run)
    assert (tmp_path / "staged/checkpoint-7/LICENSE").read_bytes() == b"text"
