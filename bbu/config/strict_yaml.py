"""YAML text from anywhere, read within bounds: a value or one typed error comes out, whatever the text holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import yaml

from bbu.errors import ConfigError

_MAX_DEPTH = 20
"""Levels of lists and mappings; the deepest config has 3."""
_MAX_VALUES = 10_000
"""Values of one file, those that aliases repeat included; the largest config has some 200."""
_MAX_DIGITS = 300
"""Of a whole number: one that is longer fits no float, and Python refuses to print it from 4,300 digits on."""

_MOST_OF_A_KIND, _SHOWN_OF_A_KIND = 8, 3
"""How many findings of one kind are all shown, and how many where there are more."""


class YamlError(ValueError):
    """A text is no YAML that can be used; its message is one line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises.

    It reads `5e-6` as a number; leaves `24:00:00` (86,400 in YAML 1.1), `010` (8) and dates texts; and refuses
    duplicate keys.
    """


_INT = re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.\d+(?:[eE][-+]?\d+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_REPLACED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Parse one YAML document without executing anything in it.

    Args:
        text: the YAML.

    Raises:
        YamlError: the text is no YAML, is nested deeply or holds very many values or a very long number.
        ConfigError: a key is given twice.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise YamlError(_describe(error)) from error
    # What its scanner and its constructors raise for texts such as `!!int x`, `!!bool x`, `2024-99-99` and `[[[…`.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError(f"nested deeper than {_MAX_DEPTH} levels") from error
    _check_bounds(value)
    return value


def shorten(findings: list[str], what: str) -> list[str]:
    """Leave out most of many findings of one kind: they hide the others.

    Args:
        findings: of one kind.
        what: completes the sentence `… and 130 more …`: "keys are missing".
    """
    if len(findings) <= _MOST_OF_A_KIND:
        return findings
    return [*findings[:_SHOWN_OF_A_KIND], f"… and {len(findings) - _SHOWN_OF_A_KIND} more {what}"]


def _describe(error: yaml.MarkedYAMLError) -> str:
    """`line 3: …`, with the usual cause in words that help."""
    mark = error.problem_mark or error.context_mark
    words = (
        [error.context, error.problem] if str(error.problem).startswith("but ") else [error.problem or error.context]
    )
    problem = " ".join(" ".join(map(str, words)).split())
    if "'\\t'" in problem:
        problem = "a tab; indent with spaces"
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    repeats: list[str] = []
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            # A list is not written out: aliases in it can make it endless.
            name = "of several values" if isinstance(key_node, yaml.CollectionNode) else repr(key)
            repeats.append(f"key {name} in line {key_node.start_mark.line + 1} is not a word; quote or remove it")
        elif key in lines:
            line = key_node.start_mark.line + 1
            repeats.append(f"duplicate key {key!r} in lines {lines[key]} and {line}; keep one")
        else:
            lines[key] = key_node.start_mark.line + 1
    if repeats:
        raise ConfigError(*shorten(repeats, "keys stand twice"))
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _check_bounds(value: Any) -> None:
    """Refuse what code that walks or prints the value would not survive.

    Aliases (`*a`) repeat a value without writing it again, and may even lead back to where they stand.
    """
    level, count = [value], 1
    for _ in range(_MAX_DEPTH):
        children = (child for item in level for child in _children(item))
        level = list(islice(children, _MAX_VALUES))
        count += len(level)
        if count > _MAX_VALUES:
            raise YamlError(f"holds more than {_MAX_VALUES} values")
        if not level:
            return
    raise YamlError(f"nested deeper than {_MAX_DEPTH} levels")


def _children(value: Any) -> Iterator[Any]:
    """The values directly in a list or mapping; keys are words."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        raise YamlError(f"a number of more than {_MAX_DIGITS} digits")
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
