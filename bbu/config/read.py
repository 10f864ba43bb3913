"""YAML files to dataclasses: run configs, flat or in five sections, and cluster profiles. Reports all findings at once.

The types of the dataclasses say what is valid, see `bbu.config.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from bbu.config.checks import CROSS_RULES, OUTPUT_RULES
from bbu.config.domains import DOMAINS, OWNERS, RETIRED, TYPES, VALUES_BEFORE
from bbu.config.flat import DirectConfig
from bbu.config.kinds import VARIABLE, CrossRule, is_text, nearest_valid, value_problems
from bbu.config.strict_yaml import YamlError, parse_yaml
from bbu.errors import ConfigError

MAX_FILE_BYTES = 100_000
"""Of a YAML file, which takes some seconds to parse; the largest config has 8,000."""
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping safely. Raises ConfigError for a missing, oversized or malformed file, or a list."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; check the name")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is not a config")
    with path.open(encoding="utf-8") as stream:
        try:
            data = parse_yaml(stream)
        except YamlError as error:
            raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return data


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
        if path.is_file():
            return path
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    near = nearest_valid(given.stem, names)
    raise ConfigError(f"no {what} {name_or_path!r}: neither a file nor one of {', '.join(names) or 'no names'}{near}")


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
    values, findings = _flatten(read_yaml(path), path, use_new)
    return _checked_config(path, values, findings, overrides, (*CROSS_RULES, *OUTPUT_RULES))


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
    path: Path, values: dict[str, Any], findings: list[str], overrides: Sequence[str], rules: Iterable[CrossRule]
) -> DirectConfig:
    override_values, override_findings = _parse_overrides(overrides)
    values |= override_values
    findings += _all_findings(TYPES, values, rules, lambda key: f" (section {OWNERS[key]})")
    if findings or override_findings:
        raise ConfigError(*(f"{path}: {text}" for text in findings), *override_findings)
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


def _all_findings(
    types: Mapping[str, Any],
    values: Mapping[str, Any],
    cross_rules: Iterable[CrossRule],
    place: Callable[[str], str] = lambda key: "",
) -> list[str]:
    """Texts of all findings, keys first. A cross rule is skipped where one of its keys is already wrong."""
    findings = list(_key_findings(types, values, "", place))
    wrong = {finding.key for finding in findings}
    texts = [finding.text for finding in findings]
    for rule in cross_rules:
        if any(key in wrong or key.partition(".")[0] in wrong for key in rule.keys):
            continue
        operands = [_value_at(values, key) for key in rule.keys]
        if rule.is_broken(*operands):
            texts.append(rule.message.format(*operands))
    return texts


def _key_findings(
    types: Mapping[str, Any], values: Mapping[str, Any], prefix: str, place: Callable[[str], str]
) -> Iterator[_Finding]:
    for key in values:
        if key not in types:
            yield _Finding(prefix + key, _unknown(key, types, prefix))
    for key, hint in types.items():
        name = prefix + key
        if key not in values:
            yield _Finding(name, f"missing key {name!r}{place(key)}; there are no defaults")
        elif is_dataclass(hint) and isinstance(values[key], dict):
            yield from _key_findings(field_types(hint), values[key], f"{name}.", place)  # type: ignore[arg-type]
        elif is_dataclass(hint):
            yield _Finding(name, f"key {name!r} must be a mapping of keys to values, not {values[key]!r}")
        else:
            yield from (_Finding(name, f"key {name!r} {text}") for text in value_problems(values[key], hint))


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
    """The valid keys of either form with their values, and findings about all others."""
    if use_new and not DOMAINS.keys() & data.keys():
        raise ConfigError(f"{path}: is not in five sections; leave out --use-new-config")
    if not use_new and DOMAINS.keys() <= data.keys():
        raise ConfigError(f"{path}: is in five sections; add --use-new-config")
    if not use_new:
        return {k: v for k, v in data.items() if k in OWNERS}, [_unknown(k, OWNERS) for k in data if k not in OWNERS]
    values: dict[str, Any] = {}
    findings = [_unknown(name, DOMAINS, what="section") for name in data if name not in DOMAINS]
    for section in DOMAINS:
        content = data.get(section)
        if isinstance(content, dict):
            values |= {key: value for key, value in content.items() if OWNERS.get(key) == section}
            findings += [_misplaced(key, section) for key in content if OWNERS.get(key) != section]
        else:
            findings.append(f"section {section!r} is missing or not a mapping")
    return values, findings


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
            findings.append(f"--set {text!r}: write key=value")
        elif key not in OWNERS:
            findings.append(f"--set: {_unknown(key, OWNERS)}")
        elif is_text(TYPES[key]):  # as it is: `save_strategy=no` would be False in YAML
            values[key] = raw
        else:
            try:
                values[key] = parse_yaml(raw)
            except YamlError:
                findings.append(f"--set {text!r}: not a value in YAML")
    return values, findings


def _unknown(key: str, valid: Iterable[str], prefix: str = "", what: str = "key") -> str:
    if key in RETIRED:
        return f"key {key!r} is no longer read: {RETIRED[key]}; remove it"
    return f"unknown {what} {prefix + key!r}{nearest_valid(key, valid) or '; remove it'}"
