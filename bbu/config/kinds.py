"""The kinds of values that config keys have, and what a key is used for.

A rule stands in the type of a field, `vision_lr: NotNegativeFloat` or `language: Literal["zh", "en"]`, beside the
field's meaning. `bbu.config.read` checks what it reads against these types. Rules that need more than one key are
`CrossRule`s and stand in `bbu.config.checks` and `bbu.jobs.clusters`.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from bbu.errors import nearest_valid

Purpose = Literal["conversion", "shard", "score"]
"""conversion: converted data depend on the key. shard: so does one shard of them, before the merge. score: the
score of a checkpoint depends on the key."""


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beside its type."""

    demand: str
    """Completes the sentence `key 'x' must …`: "be above 0"."""
    holds: Callable[[Any], bool]
    """Says whether a value, which already has the right type, satisfies the rule."""
    names: tuple[str, ...] = ()
    """Valid texts of which the nearest is proposed."""


@dataclass(frozen=True)
class UsedFor:
    """Marks a key whose value decides something that is kept, so that a change makes it stale."""

    purpose: Purpose
    """What depends on the key."""


@dataclass(frozen=True)
class CrossRule:
    """A combination of values that are fine alone and do not go together."""

    keys: tuple[str, ...]
    """The keys that the rule reads; the rule is not applied while one of them is missing or wrong."""
    is_broken: Callable[..., Any]
    """Takes the values of `keys` in their order."""
    message: str
    """What to do; `{0}`, `{1}` … stand for the values."""


def range_rule(low: float, high: float) -> Rule:
    """Demand a number from `low` to `high`, both included."""
    return Rule(f"be within {low}..{high}", lambda value: low <= value <= high)


def pattern_rule(pattern: str, demand: str) -> Rule:
    """Demand a text that a regular expression matches as a whole."""
    return Rule(demand, lambda text: re.fullmatch(pattern, text) is not None)


_POSITIVE = Rule("be above 0", lambda value: value > 0)
_NOT_NEGATIVE = Rule("not be negative", lambda value: value >= 0)

Share = Annotated[float, range_rule(0, 1)]
"""A part of a whole, 0 to 1."""
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NotNegativeInt = Annotated[int, _NOT_NEGATIVE]
NotNegativeFloat = Annotated[float, _NOT_NEGATIVE]
VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a text of a cluster profile names an environment variable of the caller."""
ProfileText = Annotated[
    str,
    Rule("hold no control character", lambda text: all(ord(c) >= 32 and ord(c) != 127 for c in text)),
    Rule("name only environment variables that are set", lambda text: not VARIABLE.search(text)),
]
"""One line with its variables replaced. A line break in a partition's name would become a line of the batch script."""

CONVERSION = UsedFor("conversion")
SHARD = UsedFor("shard")
SCORE = UsedFor("score")


def value_problems(value: Any, hint: Any) -> list[str]:
    """Check a value against a type and the rules in it.

    Args:
        value: what the YAML file holds.
        hint: `bool`, `int`, `float`, `str`, a `Literal` of texts, `list[…]`, `dict[…, …]`, any of these `| None`, or
            one of them `Annotated` with rules.

    Returns:
        What is wrong, as ends of a sentence that begins with the key: "must be above 0, not -1". Empty for a value
        that is fine.
    """
    if _has_type(value, hint):
        broken = _broken_rules(value, hint)
        return [f"must {rule.demand}, not {short_repr(part)}{nearest_valid(part, rule.names)}" for rule, part in broken]
    choices = _base_types(hint)[0]
    hint_at = nearest_valid(value, get_args(choices)) if get_origin(choices) is Literal else ""
    return [f"must be {_describe_type(hint)}, not {short_repr(value)}{hint_at}"]


def is_text(hint: Any) -> bool:
    """Say whether a type takes texts only: `str` or a `Literal` of texts, annotated or not."""
    return all(base is str or get_origin(base) is Literal for base in _base_types(hint))


def short_repr(value: Any) -> str:
    """A value for a message, cut where it is long: a file may hold any."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _base_types(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type, without their rules."""
    if get_origin(hint) is Annotated:
        return _base_types(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(base for part in get_args(hint) for base in _base_types(part))
    return (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    return any(_has_base_type(value, base) for base in _base_types(hint))


def _has_base_type(value: Any, base: Any) -> bool:
    arguments = get_args(base)
    if get_origin(base) is Literal:
        return isinstance(value, str) and value in arguments
    if get_origin(base) is list:
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if get_origin(base) is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_has_type(key, arguments[0]) and _has_type(item, arguments[1]) for key, item in pairs)
    if base is float:  # a bool is an int to Python, never to a person
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is base


def _broken_rules(value: Any, hint: Any) -> Iterator[tuple[Rule, Any]]:
    """Each broken rule, with the value or the part of it that breaks the rule."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _broken_rules(value, arguments[0])
        rules = (rule for rule in arguments[1:] if isinstance(rule, Rule))
        yield from ((rule, value) for rule in rules if not rule.holds(value))
    elif origin in (Union, types.UnionType):
        yield from () if value is None else _broken_rules(value, arguments[0])  # `X | None`
    elif origin is list:
        yield from (broken for item in value for broken in _broken_rules(item, arguments[0]))
    elif origin is dict:
        parts = [(part, kind) for pair in value.items() for part, kind in zip(pair, arguments, strict=True)]
        yield from (broken for part, kind in parts for broken in _broken_rules(part, kind))


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _describe_type(hint: Any) -> str:
    bases = [
        base for base in _base_types(hint) if not (base is int and float in _base_types(hint))
    ]  # a float may be whole
    return " or ".join(map(_describe_base, bases))


def _describe_base(base: Any) -> str:
    parts = [part for argument in get_args(base) for part in _base_types(argument)]
    if get_origin(base) is Literal:
        return f"one of {', '.join(get_args(base))}"
    if get_origin(base) is list:
        return "a list of texts" if parts == [str] else f"a list of {', '.join(get_args(parts[0]))}"
    if get_origin(base) is dict:
        return "a mapping of texts to texts"
    return _NAMES[base]
