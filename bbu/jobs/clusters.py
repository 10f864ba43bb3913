"""Cluster profiles: the facts of a site (partitions, image, binds), apart from what a run is.

A profile is `configs/clusters/NAME.yaml`. It states every field; there are no defaults, so that a profile
read next year says what it said today. `${NAME}` in a text stands for an environment variable of the caller.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.read import CONFIG_DIR, read_yaml
from bbu.errors import ConfigError
from bbu.jobs.spec import Resources

PROFILES = CONFIG_DIR / "clusters"
CHOICES = {
    "executor": ("slurm", "local"),
    "code": ("checkout", "image"),
    "shield": ("auto", "on", "off"),
    "gpu_request": ("gpus-per-node", "gres"),
    "eval_schedule": ("auto", "scrontab", "resubmit", "dependency"),
}
RANGES = {
    "gpus_per_node": (0, 1024), "cpus_per_task": (1, 4096), "time_minutes": (1, 525_600), "nice": (0, 10_000),
    "signal_seconds": (1, 65_535), "convert_tasks": (1, 1_000_000), "array_parallelism": (1, 1_000_000),
}  # fmt: skip
"""signal_seconds: Slurm keeps it in 16 bits."""
MEMORY = re.compile(r"all|\d+[MGT](?: per (?:cpu|gpu))?")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ClusterProfile:
    """One site. Field by field:

    executor: `slurm`, or `local` for this machine; work_folder: where job scripts and logs go, seen by all
    nodes; image: the container image, null to run on the host; image_sha256: what the image must be, checked
    before it is entered, null to take any; code: run the `checkout`, or the copy inside the `image`; binds:
    folders bound into the image; scratch: a folder on each node's own disk for temporary files, null for /tmp;
    shield: see slurm/container.sh; modules: `module load`ed before a job's tasks start; gpu_request: how GPUs are
    asked for; signal_seconds: how long before the time limit USR2 is sent; network_interface: for NCCL and gloo,
    null to let them choose; master_suffix: appended to the first node's name to get an address all nodes resolve;
    convert_tasks: array size of the conversion; array_parallelism: elements of an array that run at a time;
    eval_schedule: how `--every` is kept: by `scrontab`, by a job that submits itself again, by `dependency` on the
    training jobs, or `auto`, the first of these that the site allows; environment: more variables for the tasks;
    train, convert, eval: what each kind of job asks for.
    """

    executor: str
    work_folder: str
    image: str | None
    image_sha256: str | None
    code: str
    binds: list[str]
    scratch: str | None
    shield: str
    modules: list[str]
    gpu_request: str
    signal_seconds: int
    network_interface: str | None
    master_suffix: str
    convert_tasks: int
    array_parallelism: int
    eval_schedule: str
    environment: dict[str, str]
    train: Resources
    convert: Resources
    eval: Resources


def load_profile(name: str, environ: Mapping[str, str] = os.environ) -> ClusterProfile:
    """Read a profile by name (under configs/clusters) or by path; ConfigError lists every finding at once."""
    path = find_profile(name)
    values = expand(read_yaml(path), environ)
    findings = list(findings_of(ClusterProfile, values, "")) or list(cross_findings(values))
    if findings:
        raise ConfigError(*(f"{path}: {finding}" for finding in findings))
    kinds = {key: Resources(**values[key]) for key in ("train", "convert", "eval")}
    return ClusterProfile(**values | kinds)


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


def findings_of(cls: type, values: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """What is wrong with one mapping of a profile: unknown and missing keys, then values."""
    hints = typing.get_type_hints(cls)
    known, written = list(hints), [str(key) for key in values if key not in hints]
    yield from (f"unknown key {prefix}{key}{nearest(str(key), known)}" for key in values if key not in hints)
    yield from (f"missing key {prefix}{key}{nearest(key, written)}" for key in known if key not in values)
    for key in known:
        if key in values:
            yield from value_findings(prefix + key, key, values[key], hints[key])


def value_findings(where: str, key: str, value: Any, kind: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            yield from findings_of(typing.cast(type, kind), value, f"{where}.")
        else:
            yield f"{where}: {value!r} is not a mapping of keys to values"
    else:
        yield from (f"{where}: {problem}" for problem in value_problems(key, value, kind))


def cross_findings(values: Mapping[str, Any]) -> Iterator[str]:
    """Values that are fine alone and not together."""
    if values["executor"] == "local" and values["modules"]:
        yield "modules: the local executor loads none; load them yourself and state []"
    if values["code"] == "image" and not values["image"]:
        yield "code: is image, but image is null; name one, or state checkout"
    if values["image_sha256"] and not values["image"]:
        yield "image_sha256: pins no image; name one under image, or state null"
    for kind in ("train", "convert", "eval"):
        if "per gpu" in (values[kind]["memory"] or "") and not values[kind]["gpus_per_node"]:
            yield f"{kind}.memory: is {values[kind]['memory']}, but gpus_per_node is 0; ask per cpu or per node"
        if values[kind]["gpu_type"] and not values[kind]["gpus_per_node"]:
            yield f"{kind}.gpu_type: is {values[kind]['gpu_type']}, but gpus_per_node is 0; state null"


def expand(value: Any, environ: Mapping[str, str]) -> Any:
    """Put environment variables into every text; one that is not set stays as it is, and is found later."""
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: environ.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [expand(item, environ) for item in value]
    if isinstance(value, dict):
        return {expand(key, environ): expand(item, environ) for key, item in value.items()}
    return value


def value_problems(key: str, value: Any, kind: Any) -> list[str]:
    if not fits(value, kind):
        return [f"{value!r} is not {describe(kind)}"]
    problems = [problem for text in texts_of(value) for problem in text_problems(text)]
    if key in CHOICES and value not in CHOICES[key]:
        problems.append(f"{value!r} is none of {', '.join(CHOICES[key])}{nearest(value, list(CHOICES[key]))}")
    if key in RANGES and not RANGES[key][0] <= value <= RANGES[key][1]:
        problems.append(f"{value} is not between {RANGES[key][0]} and {RANGES[key][1]}")
    if key == "memory" and value is not None and not MEMORY.fullmatch(value):
        problems.append(f"{value!r} is none of 512G, 8G per cpu, 64G per gpu, all")
    if key == "image_sha256" and value is not None and not DIGEST.fullmatch(value):
        problems.append(f"{value!r} is not a SHA-256 in hex; containers/build.sh prints it")
    return problems


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if isinstance(value, bool):  # a bool is an int to Python, never to a person
        return kind is bool
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    names = {"str": "a text", "int": "a whole number", "bool": "true or false", "NoneType": "null",
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
