"""A checkpoint as a model folder to hand on: whole weights, without the state of its training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bbu.config.read import load_recorded_config
from bbu.errors import CheckpointError
from bbu.inference.predictor import check_checkpoint
from bbu.models.adapters import merge_adapters
from bbu.models.model_files import make_readable
from bbu.models.qwen import load_model, without_transformers_warnings
from bbu.reports.model_card import state_merged_adapters
from bbu.run.checkpoints import is_model_file
from bbu.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_CONFIG, is_adapter_folder

_MOST_LOSS = 0.1
"""Share of the adapters' change that rounding may take without a warning."""


def export_model(checkpoint: Path, out: Path, overrides: Sequence[str] = ()) -> str:
    """Write the model of a checkpoint into a folder of its own; adapters are merged into their base model's weights.

    The folder appears under its name once it is complete.

    Args:
        checkpoint: a `checkpoint-{step}` folder.
        out: the folder to write; it may exist if it is empty.
        overrides: `key=value` texts on top of the checkpoint's config: `model_path` names a base model that has moved,
            `torch_dtype` decides in which dtype weights with adapters are written.

    Returns:
        What was written, in a line.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` cannot be written to.
        ModelError: the base model of the adapters is gone, or is another one.
    """
    folder, target = check_checkpoint(checkpoint), out.resolve()  # `.` has no name, and a link may lead here
    _check_target(folder, target, out)
    staged = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        text = _merge(folder, staged, overrides) if is_adapter_folder(folder) else "a copy without the training's state"
        _copy_files(folder, staged)
        state_merged_adapters(staged)
        make_readable(staged)
        if target.exists():
            target.rmdir()  # it is empty
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return f"{out}: {text}"


def _check_target(folder: Path, target: Path, out: Path) -> None:
    if target.is_relative_to(folder.resolve()):
        raise CheckpointError(f"{out}: lies inside the checkpoint, which is never changed; name a folder outside of it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{out}: exists already and is not an empty folder; name another one")


def _merge(folder: Path, staged: Path, overrides: Sequence[str]) -> str:
    """Write the weights of a checkpoint of adapters; returns what became of them."""
    config = load_recorded_config(folder / RUN_CONFIG, overrides).model
    model = load_model(folder, config, for_training=False)
    loss = merge_adapters(model)
    with without_transformers_warnings():
        model.save_pretrained(staged)
    advice = "; add --set torch_dtype=float32 to keep it" if loss > _MOST_LOSS else ""
    return (
        f"a whole model in {config.torch_dtype}; rounding takes {loss:.2%} of what the adapters have learnt to change"
        f"{advice}"
    )


def _copy_files(folder: Path, staged: Path) -> None:
    """Copy the model's files. The head's are copied as well: they may be more precise than the model's dtype."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and is_model_file(name) and name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, staged / name)
