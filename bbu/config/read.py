"""YAML files to dataclasses: run configs, flat or in five sections, and cluster profiles. Reports all findings at once.

The types of the dataclasses say what is valid, see `bbu.config.kinds`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from bbu.config.checks import CROSS_RULES, OUTPUT_RULES
from bbu.config.domains import DOMAINS, OWNERS, RETIRED, TYPES, VALUES_BEFORE
from bbu.config.file_kinds import FLAT, SECTIONED, file_kind, wrong_kind
from bbu.config.flat import DirectConfig
from bbu.config.kinds import VARIABLE, CrossRule, is_text, nearest_valid, short_repr, value_problems
from bbu.config.strict_yaml import YamlError, parse_yaml, shorten
from bbu.config.yaml_files import read_yaml
from bbu.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
T = TypeVar("T")


def resolve_config_path(name_or_path: str, folder: Path = CONFIG_DIR, what: str = "config") -> Path:
    """Find a YAML file by its name in a folder of the project or by its path.

    Args:
        name_or_path: a bare name, such as `smoke`, is looked up in `folder` first; anything else is a path first.
        folder: where named files are.
        what: what the file is, for the message.

    Raises:
        ConfigError: there is no such file; lists the names.
    """
    given, named = Path(name_or_path), folder / f"{name_or_path.removesuffix('.yaml')}.yaml"
    is_bare_name = given.name == name_or_path and given.suffix not in (".yaml", ".yml")
    for path in (named, given) if is_bare_name else (given, named):
        if _is_file(path):
            return path
    if os.path.exists(given) and not is_bare_name:
        raise ConfigError(f"{name_or_path} is {'a folder' if given.is_dir() else 'no regular file'}; name a {what}")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not names:
        raise ConfigError(f"no {what} {name_or_path!r}, and {folder} has none at all; is this checkout complete?")
    near = nearest_valid(given.stem, names)
    raise ConfigError(
        f"no {what} {short_repr(name_or_path)}: neither a file in {Path.cwd()} nor one of {', '.join(names)}{near}"
    )


def _is_file(path: Path) -> bool:
    """Whether there is a file; PermissionError where a folder on the way may not be entered."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def load_config(name_or_path: str, *, overrides: Sequence[str] = (), use_new: bool = False) -> DirectConfig:
    """Load a run config, apply overrides and check it.

    Args:
        name_or_path: a name under configs/ or a path.
        overrides: `key=value` texts that replace what the file says.
        use_new: the file is in five sections.

    Raises:
        ConfigError: carries all findings, each with the file, the key and the nearest valid key.
    """
    path = resolve_config_path(name_or_path)
    data = read_yaml(path)
    values, findings = _flatten(data, path, use_new)
    absent = _absent_sections(data) if use_new else ()
    return _checked_config(path, values, findings, overrides, (*CROSS_RULES, *OUTPUT_RULES), absent)


def load_recorded_config(path: Path, overrides: Sequence[str] = ()) -> DirectConfig:
    """Load the config that a run or a checkpoint recorded, perhaps with an older version's keys.

    Retired keys are left out, and a key that is newer than the record gets the value that describes what the run did.
    A rule across keys, which may be newer than the run, is applied only where an override sets one of its keys.

    Args:
        path: `config.yaml` of a run folder or `run_config.yaml` of a checkpoint.
        overrides: `key=value` texts that replace what the file says.

    Raises:
        ConfigError: carries all findings, as `load_config` does.
    """
    recorded = {key: value for key, value in read_yaml(path).items() if key not in RETIRED}
    values, findings = _flatten(VALUES_BEFORE | recorded, path, use_new=False)
    overridden = {text.partition("=")[0] for text in overrides}
    rules = [rule for rule in CROSS_RULES if overridden & set(rule.keys)]
    return _checked_config(path, values, findings, overrides, rules)


def _checked_config(
    path: Path,
    values: dict[str, Any],
    findings: list[str],
    overrides: Sequence[str],
    rules: Iterable[CrossRule],
    absent: Collection[str] = (),
) -> DirectConfig:
    """Check values and build the config. The keys of `absent` sections, which are findings, are not looked for."""
    override_values, override_findings = _parse_overrides(overrides)
    values |= override_values
    types = {key: hint for key, hint in TYPES.items() if OWNERS[key] not in absent}
    refused = {text.partition("=")[0] for text in overrides} - override_values.keys()
    present = {key: value for key, value in values.items() if OWNERS[key] not in absent}
    findings += _all_findings(types, present, rules, lambda key: f" (section {OWNERS[key]})", refused)
    if findings or override_findings:
        raise ConfigError(*override_findings, *(f"{path}: {text}" for text in findings))
    domains = {name: _build(cls, values) for name, cls in DOMAINS.items()}
    return DirectConfig(**domains, source=path, overrides=tuple(overrides))


def read_dataclass(cls: type[T], values: Mapping[str, Any], source: Path, cross_rules: Iterable[CrossRule]) -> T:
    """Check the values of a file against a dataclass, nested ones included, and build it.

    Args:
        cls: a dataclass whose field types carry the rules.
        values: what the file holds.
        source: the file, for the messages.
        cross_rules: rules over several keys; a key of a nested dataclass is spelled `train.memory`.

    Raises:
        ConfigError: carries all findings.
    """
    findings = _all_findings(field_types(cls), values, cross_rules)
    if findings:
        raise ConfigError(*(f"{source}: {text}" for text in findings))
    return _build(cls, values)


def expand_variables(value: Any, environ: Mapping[str, str]) -> Any:
    """Replace each `${NAME}` in all texts of a YAML value; a variable that is not set stays as it is."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: environ.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [expand_variables(item, environ) for item in value]
    if isinstance(value, dict):
        return {expand_variables(key, environ): expand_variables(item, environ) for key, item in value.items()}
    return value


def field_types(cls: type) -> dict[str, Any]:
    """Field name → type, with its rules, of a dataclass."""
    return get_type_hints(cls, include_extras=True)


@dataclass(frozen=True)
class _Finding:
    """What is wrong with one key."""

    key: str
    text: str
    kind: str
    """What it has in common with others, as the end of a sentence: "keys are missing"."""


_UNKNOWN, _MISSING, _WRONG = "keys are unknown", "keys are missing", "values are refused"


def _all_findings(
    types: Mapping[str, Any],
    values: Mapping[str, Any],
    cross_rules: Iterable[CrossRule],
    place: Callable[[str], str] = lambda key: "",
    refused: Iterable[str] = (),
) -> list[str]:
    """Texts of all findings, keys first. A cross rule is skipped where a key of it is wrong, missing or `refused`."""
    findings = list(_key_findings(types, values, "", place))
    wrong = {finding.key for finding in findings}.union(refused)
    texts = _summarise(findings)
    for rule in cross_rules:
        if any({key, first := key.partition(".")[0]} & wrong or first not in values for key in rule.keys):
            continue
        operands = [_value_at(values, key) for key in rule.keys]
        if rule.is_broken(*operands):
            texts.append(rule.message.format(*operands))
    return texts


def _summarise(findings: Iterable[_Finding]) -> list[str]:
    """The texts of findings, of each kind the first only where there are many: they would hide the others."""
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding.text)
    return [text for kind, texts in kinds.items() for text in shorten(texts, kind)]


def _key_findings(
    types: Mapping[str, Any], values: Mapping[str, Any], prefix: str, place: Callable[[str], str]
) -> Iterator[_Finding]:
    for key in values:
        if key not in types:
            yield _Finding(prefix + key, _unknown(key, types, prefix), _UNKNOWN)
    for key, hint in types.items():
        name = prefix + key
        if key not in values:
            yield _Finding(name, f"missing key {name!r}{place(key)}; there are no defaults", _MISSING)
        elif is_dataclass(hint) and isinstance(values[key], dict):
            yield from _key_findings(field_types(hint), values[key], f"{name}.", place)  # type: ignore[arg-type]
        elif is_dataclass(hint):
            text = f"key {name!r} must be a mapping of keys to values, not {short_repr(values[key])}"
            yield _Finding(name, text, _WRONG)
        else:
            texts = value_problems(values[key], hint)
            yield from (_Finding(name, f"key {name!r} {text}", _WRONG) for text in texts)


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value of `memory`, or of `train.memory` in the mapping under `train`."""
    first, _, rest = key.partition(".")
    return _value_at(values[first], rest) if rest else values[first]


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from checked values; keys that are not its fields are ignored."""
    return cls(**{key: _convert(values[key], hint) for key, hint in field_types(cls).items()})


def _convert(value: Any, hint: Any) -> Any:
    if is_dataclass(hint):
        return _build(hint, value)  # type: ignore[arg-type]
    return float(value) if float in (hint, getattr(hint, "__origin__", None)) else value


def _flatten(data: dict[str, Any], path: Path, use_new: bool) -> tuple[dict[str, Any], list[str]]:
    """The valid keys of either form with their values, and findings about all others.

    Raises ConfigError for the other form, or a file of another kind: a single line, since all keys would be wrong.
    """
    kind = file_kind(data)
    if kind == SECTIONED and not use_new:
        raise ConfigError(f"{path}: is in five sections; add --use-new-config")
    if kind == FLAT and use_new:
        raise ConfigError(f"{path}: is not in five sections; leave out --use-new-config")
    if kind not in (FLAT, SECTIONED):
        raise ConfigError(f"{path}: {wrong_kind(data)}")
    if not use_new:
        unknown = [_unknown(key, OWNERS) for key in data if key not in OWNERS]
        return {k: v for k, v in data.items() if k in OWNERS}, shorten(unknown, _UNKNOWN)
    return _flatten_sections(data)


def _flatten_sections(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    absent = _absent_sections(data)
    values: dict[str, Any] = {}
    findings = [_unknown(name, DOMAINS, what="section") for name in data if name not in DOMAINS]
    findings += [f"section {section!r} is missing or not a mapping" for section in absent]
    misplaced: list[str] = []
    for section in [name for name in DOMAINS if name not in absent]:
        values |= {key: value for key, value in data[section].items() if OWNERS.get(key) == section}
        misplaced += [_misplaced(key, section) for key in data[section] if OWNERS.get(key) != section]
    return values, findings + shorten(misplaced, "keys stand in a wrong section or are unknown")


def _absent_sections(data: Mapping[str, Any]) -> list[str]:
    return [section for section in DOMAINS if not isinstance(data.get(section), dict)]


def _misplaced(key: str, section: str) -> str:
    if key in OWNERS:
        return f"key {key!r} belongs to section {OWNERS[key]!r}, not {section!r}"
    return _unknown(key, OWNERS)


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    findings: list[str] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            findings.append(f"--set {short_repr(text)}: write key=value")
        elif key not in OWNERS:
            findings.append(f"--set: {_unknown(key, OWNERS)}")
        else:
            try:  # a text as it is: `save_strategy=no` would be False in YAML
                value = raw if is_text(TYPES[key]) else parse_yaml(raw)
            except (YamlError, ConfigError):
                findings.append(f"--set {short_repr(text)}: not a value in YAML")
                continue
            problems = value_problems(value, TYPES[key])
            findings += [f"--set {text}: key {key!r} {problem}" for problem in problems]
            values |= {} if problems else {key: value}
    return values, findings


def _unknown(key: str, valid: Iterable[str], prefix: str = "", what: str = "key") -> str:
    if key in RETIRED:
        return f"key {key!r} is no longer read: {RETIRED[key]}; remove it"
    return f"unknown {what} {prefix + key!r}{nearest_valid(key.rpartition('.')[2], valid) or '; remove it'}"
