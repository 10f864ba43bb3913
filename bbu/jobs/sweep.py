"""A sweep: one run for each point of a grid over config keys."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from bbu.errors import ConfigError

_MOST_POINTS = 10_000
"""A guard against a slip of the keyboard: each point is a training run."""


def sweep_points(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each point of the grid that some axes span, the last axis changing fastest.

    Args:
        axes: values of `--sweep`, each `key=a,b`.

    Returns:
        For one axis `[("key=a",), ("key=b",)]`; of several axes each point has one override per axis.

    Raises:
        ConfigError: all findings at once, about axes that cannot be read or too many points.
    """
    findings = [finding for axis in axes for finding in _axis_findings(axis)]
    keys = [axis.partition("=")[0] for axis in axes]
    findings += [f"--sweep {key}: given twice; list all its values in one" for key in set(keys) if keys.count(key) > 1]
    points = math.prod(len(_axis_values(axis)) for axis in axes)
    if points > _MOST_POINTS:
        findings.append(f"--sweep: {points} runs; at most {_MOST_POINTS} in one submission")
    if findings:
        raise ConfigError(*findings)
    return list(
        itertools.product(
            *([f"{key}={value}" for value in _axis_values(axis)] for key, axis in zip(keys, axes, strict=True))
        )
    )


def _axis_values(axis: str) -> list[str]:
    """The values of `key=a,b`; a comma in brackets belongs to a list, which is one value."""
    return re.split(r",(?![^\[]*\])", axis.partition("=")[2])


def _axis_findings(axis: str) -> list[str]:
    """What is wrong with one axis; empty if nothing is."""
    key, equals, _ = axis.partition("=")
    values = _axis_values(axis)
    if not equals or not key or not all(values):
        return [f"--sweep {axis!r}: write key=value,value"]
    if key in ("run_name", "output_root"):
        return [f"--sweep {key}: each run gets a name of its own; sweep another key"]
    if len(set(values)) < len(values):
        return [f"--sweep {axis!r}: a value is given twice"]
    return []


def point_name(base: str, point: Sequence[str]) -> str:
    """The run_name of one point, `base.llm_lr-1e-6.seed-2`; `_` replaces characters that a name may not have."""
    return ".".join([base, *(re.sub(r"[^A-Za-z0-9._-]", "_", text.replace("=", "-", 1)) for text in point)])
