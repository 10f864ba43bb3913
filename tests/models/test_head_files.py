"""The head's own files: strict loaders take the folder, older checkpoints load, and damage is one typed line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from bbu.errors import ModelError
from bbu.evaluation.pending import sources_of
from bbu.models.qwen import BBUModel, load_model
from bbu.models.tiny import build_tiny_model
from bbu.run.folder import HEAD_KEY
from tests.models.folders import MODEL, copy_folder, head_config, model_with_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_head(tmp_path_factory.mktemp("model") / "new")


@pytest.fixture(scope="module")
def model(folder: Path) -> BBUModel:
    return load_model(folder, MODEL, head_config())


def in_old_form(folder: Path, target: Path) -> Path:
    """A copy as older versions saved it: the head among the model's weights, described in config.json."""
    copy_folder(folder, target)
    head = target / "detection_head"
    weights = load_file(target / "model.safetensors") | load_file(head / "model.safetensors")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {
        HEAD_KEY: json.loads((head / "config.json").read_text())
    }
    (target / "config.json").write_text(json.dumps(config))
    for path in (head / "model.safetensors", head / "config.json"):
        path.unlink()
    head.rmdir()
    return target


def served_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as servers read them: every *.safetensors beside config.json, or those that an index names."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()) & set(files))
    return {name: weight for file in files for name, weight in load_file(folder / file).items()}


def assert_equal_models(one: BBUModel, other: BBUModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_strict_loaders_find_the_stock_model_and_nothing_else(folder: Path, tmp_path: Path):
    stock, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert served_weights(folder).keys() == served_weights(build_tiny_model(tmp_path, seed=0)).keys()
    assert HEAD_KEY not in stock.config.to_dict()


@pytest.mark.parametrize("copy", [copy_folder, in_old_form], ids=["new form", "old form"])
def test_the_model_is_loaded_again_bit_for_bit(model: BBUModel, folder: Path, tmp_path: Path, copy: Callable):
    path = copy(folder, tmp_path / "copy")
    assert_equal_models(load_model(path, MODEL, for_training=False), model)
    assert_equal_models(load_model(path, MODEL, head_config()), model)
    assert sources_of(path) == ("answer", "head", "both")


def test_a_large_model_is_saved_in_shards_whose_index_lists_the_stock_weights(model: BBUModel, folder: Path, tmp_path):
    path = copy_folder(folder, tmp_path / "copy")
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="2MB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    weights = served_weights(path)
    assert weights.keys() == index["weight_map"].keys() == served_weights(folder).keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert_equal_models(load_model(path, MODEL), model)


def test_copies_of_the_weights_are_saved_without_the_tied_one(model: BBUModel, folder: Path, tmp_path: Path):
    copies = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=copies)
    for name in ("model.safetensors", "detection_head/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_with_other_names_of_weights_is_saved_under_the_published_ones(folder: Path, tmp_path: Path):
    """Under ZeRO-3, version 0.2.0 once saved names that transformers 5 alone can load."""
    path = copy_folder(folder, tmp_path / "copy")
    weights = load_file(path / "model.safetensors")
    odd = {name.replace("model.", "model.model.", 1): weight for name, weight in weights.items()}
    save_file(odd, path / "model.safetensors", metadata={"format": "pt"})
    load_model(path, MODEL).save_pretrained(path)
    assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_head_is_taken_built_or_left_out_as_requested(folder: Path, tmp_path: Path):
    assert load_model(folder, MODEL, head_config("detection_enabled=false")).detection_head is None
    plain = build_tiny_model(tmp_path / "plain", seed=0)
    assert load_model(plain, MODEL).detection_head is None
    assert load_model(plain, MODEL, head_config()).detection_head is not None
    with pytest.raises(ModelError, match="its detection head has another queries"):
        load_model(folder, MODEL, head_config("detection_num_queries=30"))


def test_a_model_saved_without_a_head_leaves_none_in_the_folder(folder: Path, tmp_path: Path):
    path = copy_folder(folder, tmp_path / "copy")
    load_model(path, MODEL, head_config("detection_enabled=false")).save_pretrained(path)
    assert not (path / "detection_head").exists() and sources_of(path) == ("answer",)


def test_another_dtype_is_that_of_the_head_too(folder: Path):
    model = load_model(folder, MODEL.__class__(**{**vars(MODEL), "torch_dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def change_weights(path: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(path / "detection_head/model.safetensors")
    change(weights)
    save_file(weights, path / "detection_head/model.safetensors")


def change_description(path: Path, **values: object) -> None:
    file = path / "detection_head/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "detection_head.norm.bias"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights gone": (lambda f: (f / "detection_head/model.safetensors").unlink(), "cannot load the detection head"),
    "weights cut": (lambda f: halve(f / "detection_head/model.safetensors"), "cannot load the detection head"),
    "a weight gone": (lambda f: change_weights(f, lambda w: w.pop(NORM)), "for example .*norm.bias"),
    "a weight besides": (lambda f: change_weights(f, lambda w: w.update(more=w[NORM] + 1)), "for example more"),
    "another shape": (lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(3)})), "norm.bias"),
    "description gone": (lambda f: (f / "detection_head/config.json").unlink(), "no such file, although"),
    "description cut": (lambda f: halve(f / "detection_head/config.json"), "not JSON"),
    "description of another head": (lambda f: change_description(f, ffn=64), "of another shape than config.json says"),
    "description of a newer head": (lambda f: change_description(f, sparse=True), "does not know it: 'sparse'"),
    "description without a size": (lambda f: change_description(f, heads=0), "every size must be at least 1"),
    "description of uneven heads": (lambda f: change_description(f, heads=5), "no multiple of heads 5"),
    "description without a prior": (lambda f: change_description(f, prior=0.0), "no probability between 0 and 1"),
    "description with a text": (lambda f: change_description(f, width="wide"), "width must be int"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_head_is_one_line_and_the_model_without_it_still_loads(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
):
    path = copy_folder(folder, tmp_path / "copy")
    damage(path)
    with pytest.raises(ModelError, match=message) as error:
        load_model(path, MODEL, for_training=False)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert load_model(path, MODEL, head_config("detection_enabled=false")).detection_head is None


def test_an_old_folder_whose_head_weights_are_gone_gets_no_random_head(folder: Path, tmp_path: Path):
    path = in_old_form(folder, tmp_path / "old")
    save_file(load_file(folder / "model.safetensors"), path / "model.safetensors", metadata={"format": "pt"})
    for detection in (None, head_config()):
        with pytest.raises(ModelError, match="a detection head whose weights are gone"):
            load_model(path, MODEL, detection)
    assert load_model(path, MODEL, head_config("detection_enabled=false")).detection_head is None
