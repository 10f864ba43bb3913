"""Which files, folders and packages that a run config names are missing on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.config.flat import DirectConfig
from bbu.config.label_files import load_label_scheme, read_label_file
from bbu.config.optimizers import missing_optimizer_package
from bbu.config.read import CONFIG_DIR
from bbu.errors import BBUError


def missing_paths(config: DirectConfig) -> list[str]:
    """Look at every path that a training reads or writes, at the vendor's photos that a conversion reads, and at the
    package of the optimizer.

    Returns:
        A line each for what is missing or cannot be used: the key, its value, and what is wrong.
    """
    infra = config.infrastructure
    lines = [_folder_problem("model_path", Path(config.model.model_path))]
    lines += _data_problems(config.data)
    lines += _label_problems(config.data)
    if infra.deepspeed_enabled and not _has_file(infra.deepspeed_config):
        lines.append(f"deepspeed_config {infra.deepspeed_config}: no such file")
    if package := missing_optimizer_package(config.training.optim):
        lines.append(f"optim {config.training.optim}: the Python package {package} is not installed")
    lines.append(_output_problem(Path(infra.output_root)))
    return [line for line in lines if line]


def _data_problems(data: DataConfig) -> Iterator[str]:
    root = Path(data.data_root)
    if problem := _folder_problem("data_root", root):
        yield f"{problem} (`python -m bbu.convert` writes it)"
    else:
        teachers = [("teacher_file", data.teacher_file)] if data.num_teacher_samples else []
        for key, name in (("train_file", data.train_file), ("val_file", data.val_file), *teachers):
            yield "" if (root / name).is_file() else f"{key} {root / name}: no such file"
        yield _folder_problem("image_folder", root / data.image_folder)
    if problem := _folder_problem("vendor_dir", Path(data.vendor_dir)):
        yield f"{problem} (a conversion alone reads it)"


def _label_problems(data: DataConfig) -> Iterator[str]:
    try:
        load_label_scheme(data)
    except BBUError as error:
        yield from (f"label_hierarchy_file: {line}" for line in str(error).splitlines())
    try:
        read_label_file(data.token_map_file)
    except BBUError as error:
        yield from (f"token_map_file: {line}" for line in str(error).splitlines())


def _folder_problem(key: str, path: Path) -> str:
    if not path.is_dir():
        return f"{key} {path}: {'a file, not a folder' if path.exists() else 'no such folder'}"
    return "" if os.access(path, os.R_OK | os.X_OK) else f"{key} {path}: you may not read it"


def _has_file(name: str) -> bool:
    """Whether a file is there: at the path as it is, or relative to the checkout."""
    return Path(name).is_file() or (CONFIG_DIR.parent / name).is_file()


def _output_problem(folder: Path) -> str:
    """A folder that does not exist yet is made below its nearest parent."""
    absolute = folder.absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return ""
    return f"output_root {folder}: {existing} {'cannot be written' if existing.is_dir() else 'is a file'}"
