"""Reads the label files that a run config names."""

from __future__ import annotations

from typing import Any

from bbu.config.domains import DataConfig
from bbu.config.read import CONFIG_DIR, resolve_config_path
from bbu.config.yaml_files import read_yaml
from bbu.errors import DataError
from bbu.labels import RESPONSE_TYPES, LabelScheme

_LABELS_FOLDER = CONFIG_DIR / "labels"


def load_label_scheme(config: DataConfig) -> LabelScheme:
    """Read the label hierarchy of a config, and take the levels of a description from its `response_types`.

    Raises:
        ConfigError: the file does not exist or is no YAML mapping.
        DataError: a type does not list its properties, or `response_types` does not make a description.
    """
    hierarchy = read_label_file(config.label_hierarchy_file)
    for object_type, properties in hierarchy.items():
        if not isinstance(properties, list) or not all(isinstance(p, str) for p in properties):
            raise DataError(f"{config.label_hierarchy_file}: {object_type!r} must list its properties ([] for none)")
    levels = config.response_types
    if "object_type" not in levels or any(level not in RESPONSE_TYPES for level in levels):
        names = ", ".join(RESPONSE_TYPES)
        raise DataError(f"response_types {list(levels)}: choose from {names}, object_type among them")
    return LabelScheme({name: tuple(properties) for name, properties in hierarchy.items()}, tuple(levels))


def read_label_file(name: str) -> dict[str, Any]:
    """Read a YAML mapping of labels; `name` is one under configs/labels or a path. Raises ConfigError."""
    return read_yaml(resolve_config_path(name, _LABELS_FOLDER, "label file"))
