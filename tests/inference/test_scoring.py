"""What the score of a checkpoint depends on: the key changes with that, and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bbu.config.read import load_config, load_recorded_config
from bbu.conversion.shards import convert_shard, merge_shards
from bbu.errors import CheckpointError, DataError, NonFiniteError
from bbu.evaluation.predictions import Prediction
from bbu.inference.scoring import (
    _SCORE_CODE,
    CheckpointScorer,
    _PhotoPredictor,
    _prediction_of,
    checkpoints_to_score,
)
from bbu.run.folder import RUN_CONFIG, RunFolder
from bbu.run.provenance import computing_code_hash
from bbu.schema import View
from tests.commands import ROOT, Demo
from tests.test_structure import imported_names

COMPUTES_NOTHING = {"config", "errors.py", "logs.py", "run", "strict_json.py"}


def key_of(demo: Demo, run: Path, *settings: str, source: str = "answer", num_teachers: int = 0) -> str:
    """The key of a score of checkpoint-3 of a run, which needs no more than a manifest for it."""
    folder = run / "checkpoint-3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MANIFEST.json").write_text("{}")
    config = load_config("smoke", overrides=[*demo.settings, *settings])
    scorer = CheckpointScorer(folder, config, num_teachers)
    return scorer._plan(source).facts.key()  # pyright: ignore[reportArgumentType]


def convert_again(demo: Demo, root: Path, *settings: str) -> str:
    """Convert the demo's photos into another folder; the setting that points a config at them."""
    config = load_config("smoke", overrides=[*demo.settings, f"data_root={root}", *settings]).data
    convert_shard(config, 0, 1)
    merge_shards(config, 1)
    return f"data_root={root}"


def test_photos_of_another_quality_under_equal_records_are_scored_anew(demo: Demo, tmp_path: Path):
    same = convert_again(demo, tmp_path / "same")
    other = convert_again(demo, tmp_path / "other", "jpeg_quality=30")
    assert (tmp_path / "same/val.jsonl").read_bytes() == (tmp_path / "other/val.jsonl").read_bytes()
    run = tmp_path / "output-a"
    assert key_of(demo, run, same) == key_of(demo, run)
    assert key_of(demo, run, other) != key_of(demo, run)
    with_examples = [key_of(demo, run, root, num_teachers=1) for root in (same, other)]
    assert len({key_of(demo, run), *with_examples}) == 3


def test_another_hierarchy_of_the_same_name_is_scored_anew(demo: Demo, tmp_path: Path):
    hierarchy = tmp_path / "hierarchy.yaml"
    keys = set()
    for text in ("螺丝连接点: [BBU安装螺丝]\n", "# a comment\n螺丝连接点: [BBU安装螺丝]\n", "螺丝连接点: []\n"):
        hierarchy.write_text(text)
        keys.add(key_of(demo, tmp_path / "output-a", f"label_hierarchy_file={hierarchy}"))
    assert len(keys) == 2


def test_settings_that_a_score_depends_on_are_in_the_key_and_others_are_not(demo: Demo, tmp_path: Path):
    run = tmp_path / "output-a"
    first = key_of(demo, run)
    assert key_of(demo, run, "llm_lr=1e-4", "generation_batch_size=1", "run_name=b") == first
    others = [key_of(demo, run, setting) for setting in ("eval_iou_threshold=0.75", "max_eval_examples=2")]
    assert len({first, key_of(demo, run, source="head"), *others}) == 4


def scorer(demo: Demo, run: Path, *settings: str, num_teachers: int = 0) -> CheckpointScorer:
    """A scorer of checkpoint-3 of a run under the config that the checkpoint recorded, with some settings changed."""
    key_of(demo, run)
    recorded = run / "checkpoint-3" / RUN_CONFIG
    recorded.write_text(yaml.safe_dump(load_config("smoke", overrides=demo.settings).as_flat()))
    return CheckpointScorer(run / "checkpoint-3", load_recorded_config(recorded, settings), num_teachers)


def test_ground_truth_that_cannot_be_scored_is_refused_before_anything_is_predicted(demo: Demo, tmp_path: Path):
    data = Path(shutil.copytree(demo.root / "data", tmp_path / "data"))
    run, val = tmp_path / "output-a", data / "val.jsonl"
    first, *others = val.read_text(encoding="utf-8").splitlines(keepends=True)
    val.write_text("".join([first, *others, first.replace("ds_rescaled/", "./ds_rescaled//")]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"val\.jsonl:{len(others) + 2}: .* is listed in line 1 already"):
        scorer(demo, run, f"data_root={data}").score("answer")
    val.write_text("\n")
    with pytest.raises(DataError, match="no record to score"):
        scorer(demo, run, f"data_root={data}").score("answer")
    shutil.copy(demo.root / "data/val.jsonl", val)
    shutil.rmtree(data / "ds_rescaled")
    with pytest.raises(DataError, match=r"none of the \d+ photos of val\.jsonl is there"):
        scorer(demo, run, f"data_root={data}").score("answer")
    assert not list(run.glob("eval/**/claims/*"))


@pytest.mark.parametrize("settings", [("max_pixels=3136",), ("min_pixels=40000", "max_pixels=50176")])
def test_photos_of_another_size_than_the_model_sees_are_refused(demo: Demo, tmp_path: Path, settings: tuple[str, ...]):
    with pytest.raises(DataError, match=r"sizes differ \(record .*, photo .*, model .* pixels\)"):
        scorer(demo, tmp_path / "output-a", *settings).score("answer")


def test_a_score_that_is_not_finite_is_no_prediction():
    poisoned = SimpleNamespace(scores=(0.5, float("nan")), size=(28, 28))
    with pytest.raises(NonFiniteError, match="use another checkpoint"):
        _prediction_of("a.jpeg", poisoned)  # type: ignore[arg-type]


def test_a_photo_that_the_prompt_shows_with_its_answer_is_not_scored(demo: Demo, tmp_path: Path):
    data = Path(shutil.copytree(demo.root / "data", tmp_path / "data"))
    shutil.copy(data / "val.jsonl", data / "teacher.jsonl")
    settings = f"data_root={data}"
    scorer(demo, tmp_path / "output-a", settings)._plan("answer")
    with pytest.raises(DataError, match="is a worked example and is to be scored too"):
        scorer(demo, tmp_path / "output-a", settings, num_teachers=1)._plan("answer")


def test_tensorboard_has_one_point_a_step_and_no_score_on_other_photos(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunFolder(tmp_path / "output-a").create()
    run.config.write_text(yaml.safe_dump(load_config("smoke", overrides=demo.settings).as_flat()))
    monkeypatch.setattr(_PhotoPredictor, "predict_batches", predict_nothing)
    for code, settings in (
        ("old", ()),
        ("new", ()),
        ("new", ("val_file=train.jsonl",)),
        ("new", ("max_eval_examples=1",)),
    ):
        monkeypatch.setattr("bbu.inference.scoring._score_code_hash", lambda code=code: code)
        score = scorer(demo, run.root, *settings).score("answer")
        assert score is not None and score.is_new
        assert score.differs == tuple(setting.partition("=")[0] for setting in settings)
        assert ("not in TensorBoard" in score.mark) == bool(settings)
    points = EventAccumulator(str(run.tensorboard / "eval/answer")).Reload().Scalars("detection/class_aware/f1@0.50")
    assert [(point.step, point.value) for point in points] == [(3, 0.0)]
    assert len(list(run.tensorboard.rglob("events.*"))) == 1


def predict_nothing(self: object, views: Sequence[View], source: str) -> Iterator[list[Prediction]]:
    yield [Prediction(view.images[0], ()) for view in views]


def test_a_comment_anywhere_or_code_that_computes_no_score_scores_nothing_anew(tmp_path: Path):
    package = Path(shutil.copytree(ROOT / "bbu", tmp_path / "bbu", ignore=shutil.ignore_patterns("__pycache__")))
    first = computing_code_hash(_SCORE_CODE, package)
    for name, text in (("jobs/sweep.py", "# why\nx = 1\n"), ("models/qwen.py", "# why\n")):
        with (package / name).open("a", encoding="utf-8") as file:
            file.write(text)
    assert computing_code_hash(_SCORE_CODE, package) == first
    with (package / "models/qwen.py").open("a", encoding="utf-8") as file:
        file.write("x = 1\n")
    assert computing_code_hash(_SCORE_CODE, package) != first


def used_files(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A file of the package and all that it imports, directly or not."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    yield path
    for name in imported_names(path):
        if name.startswith("bbu."):
            yield from used_files(ROOT / (name.replace(".", "/") + ".py"), seen)


def test_all_code_that_scoring_uses_is_in_the_key_but_for_what_computes_nothing():
    parts = {path.relative_to(ROOT / "bbu").parts[0] for path in used_files(ROOT / "bbu/inference/scoring.py", set())}
    assert parts - COMPUTES_NOTHING <= set(_SCORE_CODE)


def test_a_run_that_has_not_begun_or_has_no_checkpoint_has_nothing_to_score(tmp_path: Path):
    run, messages = RunFolder(tmp_path / "output-a").create(), []
    with pytest.raises(CheckpointError, match=r"not a run folder \(no config\.yaml\)"):
        checkpoints_to_score(run, messages.append)
    run.jobs.touch()
    assert checkpoints_to_score(run, messages.append) == []
    run.config.touch()
    assert checkpoints_to_score(run, messages.append) == []
    assert [message.rpartition(": ")[2] for message in messages] == [
        "not begun yet, nothing to score", "no checkpoint yet, nothing to score",
    ]  # fmt: skip
    for step in (10, 3):
        run.checkpoint(step).mkdir()
    assert checkpoints_to_score(run, messages.append) == [run.checkpoint(3), run.checkpoint(10)]
