"""A sweep: one run for each point of a grid over config keys."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from bbu.errors import ConfigError

MOST_POINTS = 10_000


def grid(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each point of `--sweep key=a,b` axes, the last axis fastest: `[("key=a",), ("key=b",)]`.

    Raises ConfigError, all findings at once, for an axis that is none.
    """
    findings = [finding for axis in axes for finding in axis_findings(axis)]
    keys = [axis.partition("=")[0] for axis in axes]
    findings += [f"--sweep {key}: given twice; list all its values in one" for key in set(keys) if keys.count(key) > 1]
    points = math.prod(len(values_of(axis)) for axis in axes)
    if points > MOST_POINTS:
        findings.append(f"--sweep: {points} runs; at most {MOST_POINTS} in one submission")
    if findings:
        raise ConfigError(*findings)
    return list(
        itertools.product(
            *([f"{key}={value}" for value in values_of(axis)] for key, axis in zip(keys, axes, strict=True))
        )
    )


def values_of(axis: str) -> list[str]:
    """The values of `key=a,b`; a comma inside of brackets belongs to a list."""
    return re.split(r",(?![^\[]*\])", axis.partition("=")[2])


def axis_findings(axis: str) -> list[str]:
    key, equals, _ = axis.partition("=")
    values = values_of(axis)
    if not equals or not key or not all(values):
        return [f"--sweep {axis!r}: write key=value,value"]
    if key in ("run_name", "output_root"):
        return [f"--sweep {key}: each run gets a name of its own; sweep another key"]
    if len(set(values)) < len(values):
        return [f"--sweep {axis!r}: a value stands there twice"]
    return []


def point_name(base: str, point: Sequence[str]) -> str:
    """The run_name of one point: `base.llm_lr-1e-6.seed-2`; what a name may not hold becomes `_`."""
    return ".".join([base, *(re.sub(r"[^A-Za-z0-9._-]", "_", text.replace("=", "-", 1)) for text in point)])
