"""YAML to DirectConfig: the flat form and its twin in five sections; every finding is told at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from bbu.config.checks import check_config
from bbu.config.flat import DOMAINS, OWNERS, DirectConfig
from bbu.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
TYPES: dict[str, Any] = {key: hint for cls in DOMAINS.values() for key, hint in get_type_hints(cls).items()}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-6` as a number and refuses duplicate keys (YAML 1.1 does neither)."""


_FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.\d+(?:[eE][-+]?\d+)?$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    repeats: list[str] = []
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            repeats.append(f"key {key!r} in line {key_node.start_mark.line + 1} is not a word; quote or remove it")
        elif key in lines:
            line = key_node.start_mark.line + 1
            repeats.append(f"duplicate key {key!r} in lines {lines[key]} and {line}; keep one")
        else:
            lines[key] = key_node.start_mark.line + 1
    if repeats:
        raise ConfigError(*(f"{node.start_mark.name}: {r}" for r in repeats))
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping safely. Raises ConfigError for a missing, oversized, malformed or list file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; check the name")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is not a config")
    with path.open(encoding="utf-8") as stream:
        try:
            data = yaml.load(stream, _Loader)  # a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return data


def resolve_config_path(name_or_path: str, folder: Path = CONFIG_DIR) -> Path:
    """A path to an existing file as it is, else a name under `folder`. Raises ConfigError listing the names."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    named = folder / f"{name_or_path.removesuffix('.yaml')}.yaml"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise ConfigError(f"config {name_or_path!r}: no such file and no such name; names are: {names}")


def load_config(name_or_path: str, *, overrides: Sequence[str] = (), use_new: bool = False) -> DirectConfig:
    """Load a run config, flat or (use_new) in five sections, apply `key=value` overrides and check it.

    Raises ConfigError with every finding at once: key, file, nearest valid key.
    """
    path = resolve_config_path(name_or_path)
    values, findings = _flatten(read_yaml(path), path) if use_new else _flat_values(read_yaml(path), path)
    overriding, wrong = _parse_overrides(overrides)
    values |= overriding
    findings += wrong + _missing(values, path) + _wrong_types(values, path)
    if findings:
        raise ConfigError(*findings)
    config = _build(values, path, tuple(overrides))
    check_config(config)
    return config


def _build(values: dict[str, Any], path: Path, overrides: tuple[str, ...]) -> DirectConfig:
    domains = {
        name: cls(**{f.name: _coerce(values[f.name], f.name) for f in dataclasses.fields(cls)})
        for name, cls in DOMAINS.items()
    }
    return DirectConfig(**domains, source=path, overrides=overrides)


def _flat_values(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    if DOMAINS.keys() <= data.keys():
        return {}, [f"{path}: is in five sections; add --use-new-config"]
    return {k: v for k, v in data.items() if k in OWNERS}, [_unknown(k, path, OWNERS) for k in data if k not in OWNERS]


def _flatten(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    findings = [_unknown(s, path, DOMAINS, "section") for s in data if s not in DOMAINS]
    for section in DOMAINS:
        content = data.get(section)
        if not isinstance(content, dict):
            findings.append(f"{path}: section {section!r} is missing or not a mapping")
            continue
        for key, value in content.items():
            if OWNERS.get(key) == section:
                values[key] = value
            elif key in OWNERS:
                findings.append(f"{path}: key {key!r} belongs to section {OWNERS[key]!r}, not {section!r}")
            else:
                findings.append(_unknown(key, path, OWNERS))
    return values, findings


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    findings: list[str] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            findings.append(f"--set {text!r}: write key=value")
        elif key not in OWNERS:
            findings.append(_unknown(key, Path("--set"), OWNERS))
        elif TYPES[key] is str:
            values[key] = raw
        else:
            try:
                values[key] = yaml.load(raw, _Loader)
            except yaml.YAMLError:
                findings.append(f"--set {text!r}: not a value in YAML")
    return values, findings


def _unknown(key: Any, where: Path, valid: Iterable[str], what: str = "key") -> str:
    near = difflib.get_close_matches(str(key), list(valid), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
    return f"{where}: unknown {what} {key!r}{hint}"


def _missing(values: dict[str, Any], path: Path) -> list[str]:
    return [
        f"{path}: missing key {key!r} (section {OWNERS[key]}); there are no defaults"
        for key in OWNERS
        if key not in values
    ]


def _wrong_types(values: dict[str, Any], path: Path) -> list[str]:
    return [
        f"{path}: key {key!r} must be {_type_name(TYPES[key])}, not {value!r}"
        for key, value in values.items()
        if not _fits(value, TYPES[key])
    ]


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    if hint == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint


def _coerce(value: Any, key: str) -> Any:
    return float(value) if TYPES[key] is float else value
