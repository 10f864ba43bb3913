"""The detection head's own files in a model folder: what it is built from, and its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bbu.errors import ModelError
from bbu.models.detection_head import DetectionHead, HeadSpec
from bbu.run.folder import HEAD_CONFIG, HEAD_FOLDER, HEAD_WEIGHTS, read_head_spec
from bbu.strict_json import JsonError, build_dataclass

_PREFIX = "detection_head."
"""What the names of the head's weights begin with, in memory and on disk."""


def split_weights(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split a model's weights into those of the stock architecture and those of the head."""
    head = {name: tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in weights.items() if name not in head}, head


def weight_names(head: DetectionHead) -> set[str]:
    """The names of the head's weights in the whole model."""
    return {f"{_PREFIX}{name}" for name in head.state_dict()}


def load_spec(folder: Path) -> HeadSpec | None:
    """Read what the folder's head is built from; None without a head. Raises ModelError where it is damaged."""
    description = read_head_spec(folder, ModelError)
    if description is None:
        return None
    try:
        spec = build_dataclass(HeadSpec, description)
        if min(spec.queries, spec.width, spec.layers, spec.heads, spec.ffn, spec.adapter_width) < 1:
            raise JsonError("every size must be at least 1")
        if not 0 < spec.prior < 1:
            raise JsonError(f"prior {spec.prior} is no probability between 0 and 1")
        if spec.width % spec.heads:
            raise JsonError(f"width {spec.width} is no multiple of heads {spec.heads}")
        return spec
    except JsonError as error:
        raise ModelError(
            f"{folder}: its detection head is described wrongly ({error}); copy the folder again"
        ) from error


def save_head(folder: Path, spec: Mapping[str, Any] | None, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the head's files in place of those that a model saved there before may have left.

    Args:
        folder: the model folder.
        spec: what the head is built from; None for a model without a head.
        weights: its weights, by their names in the whole model.
    """
    target = folder / HEAD_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    if spec is None:
        return
    target.mkdir()
    # Copies, because safetensors refuses tensors that share memory, as those of a flat optimizer buffer do.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    save_file(copies, target / HEAD_WEIGHTS, metadata={"format": "pt"})
    (target / HEAD_CONFIG).write_text(json.dumps(dict(spec), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_head(head: DetectionHead, folder: Path) -> None:
    """Fill a head with the weights of its own file; raises ModelError where they are missing or do not fit."""
    path = folder / HEAD_FOLDER / HEAD_WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: cannot load the detection head ({reason}); copy the folder again") from error
    expected = {f"{_PREFIX}{name}": tensor.shape for name, tensor in head.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
        raise ModelError(
            f"{path}: {len(wrong)} weights are missing, unknown or of another shape than {HEAD_CONFIG} says, for "
            f"example {wrong[0]}; copy the folder again"
        )
    head.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()})


def has_own_weights(folder: Path) -> bool:
    """Whether the folder's head has files of its own; older checkpoints hold it among the model's weights."""
    return (folder / HEAD_FOLDER).is_dir()
