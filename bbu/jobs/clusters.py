"""Cluster profiles: the facts of a site (partition, account, image, binds), apart from what a run is.

A profile is `configs/clusters/NAME.yaml`. It states every field; there are no defaults, so that a profile
read next year says what it said today. `${NAME}` in a text stands for an environment variable of the caller.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.load import CONFIG_DIR, read_yaml
from bbu.errors import ConfigError

PROFILES = CONFIG_DIR / "clusters"
CHOICES = {"executor": ("slurm", "local"), "shield": ("auto", "on", "off")}
AT_LEAST = {
    "gpus_per_node": 0, "cpus_per_task": 1, "time_minutes": 1, "signal_seconds": 1, "convert_tasks": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ClusterProfile:
    """One site. Field by field:

    executor: `slurm`, or `local` for this machine; work_folder: where job scripts and logs go, seen by all
    nodes; image: the container image, null to run on the host; binds: folders bound into the image; shield:
    see slurm/container.sh; partition, account, qos, constraint: as sbatch takes them, null to leave out;
    gpus_per_node: one task is started per GPU, at least one per node; memory_gb: per node, null to leave out;
    signal_seconds: how long before the time limit USR2 is sent; network_interface: for NCCL and gloo, null to
    let them choose; master_suffix: appended to the first node's name to get an address all nodes resolve;
    convert_tasks: array size of the conversion; environment: more variables for the tasks.
    """

    executor: str
    work_folder: str
    image: str | None
    binds: list[str]
    shield: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpus_per_node: int
    cpus_per_task: int
    memory_gb: float | None
    time_minutes: int
    signal_seconds: int
    network_interface: str | None
    master_suffix: str
    convert_tasks: int
    environment: dict[str, str]


TYPES: dict[str, Any] = typing.get_type_hints(ClusterProfile)


def load_profile(name: str, environ: Mapping[str, str] = os.environ) -> ClusterProfile:
    """Read a profile by name (under configs/clusters) or by path; ConfigError lists every finding at once."""
    path = find_profile(name)
    values = read_yaml(path)
    findings = key_findings(path, values)
    known = {key: expand(value, environ) for key, value in values.items() if key in TYPES}
    for key, value in known.items():
        findings += [f"{path}: {key}: {problem}" for problem in value_problems(key, value)]
    if findings:
        raise ConfigError(*findings)
    return ClusterProfile(**known)


def find_profile(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else PROFILES / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in PROFILES.glob("*.yaml"))
    hint = nearest(name, known)
    raise ConfigError(f"no cluster profile {path}; there are: {', '.join(known) or 'none'}{hint}")


def nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def key_findings(path: Path, values: dict[str, Any]) -> list[str]:
    known = list(TYPES)
    unknown = [f"{path}: unknown key {key}{nearest(str(key), known)}" for key in values if key not in known]
    written = [str(key) for key in values if key not in known]
    missing = [
        f"{path}: missing key {key}{nearest(key, written)}" for key in known if key not in values
    ]  # fmt: skip
    return unknown + missing


def expand(value: Any, environ: Mapping[str, str]) -> Any:
    """Put environment variables into every text; one that is not set stays as it is, and is found later."""
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: environ.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [expand(item, environ) for item in value]
    if isinstance(value, dict):
        return {key: expand(item, environ) for key, item in value.items()}
    return value


def value_problems(key: str, value: Any) -> list[str]:
    if not fits(value, TYPES[key]):
        return [f"{value!r} is not {describe(TYPES[key])}"]
    problems = [problem for text in texts_of(value) for problem in text_problems(text)]
    if key in CHOICES and value not in CHOICES[key]:
        problems.append(f"{value!r} is none of {', '.join(CHOICES[key])}{nearest(value, list(CHOICES[key]))}")
    if key in AT_LEAST and value < AT_LEAST[key]:
        problems.append(f"{value} is less than {AT_LEAST[key]}")
    if key == "memory_gb" and value is not None and value <= 0:
        problems.append(f"{value} is not more than 0")
    return problems


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if isinstance(value, bool):  # a bool is an int to Python, never to a person
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def describe(kind: Any) -> str:
    names = {"str": "a text", "int": "a whole number", "float": "a number", "NoneType": "null",
             "list[str]": "a list of texts", "dict[str, str]": "a mapping of texts to texts"}  # fmt: skip
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(names[str(part) if typing.get_origin(part) else part.__name__] for part in parts)


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    return [text for pair in value.items() for text in pair] if isinstance(value, dict) else []


def text_problems(text: str) -> list[str]:
    """A line break in a partition's name would become a line of the batch script."""
    problems = []
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        problems.append(f"{text!r} holds a control character")
    if unset := re.findall(r"\$\{(\w+)\}", text):
        problems.append(f"the environment variable {unset[0]} is not set")
    return problems
