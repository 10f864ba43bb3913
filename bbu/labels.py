"""A label: its type, property and status, and the text in which records and answers write it.

A description such as `螺丝连接点/BBU安装螺丝/安装正确` names one level after another. Not every description has all
three: `response_types` chooses the levels that are written, a type may have no properties, and most parts have no
status. The label hierarchy says which types have properties, so that a text can be read back without guessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["type", "property", "status"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""The levels of a label, as metrics name them."""
ResponseType = Literal["object_type", "property", "extra_info"]
RESPONSE_TYPES: tuple[ResponseType, ...] = get_args(ResponseType)
"""The same levels in the same order, as the config key `response_types` names them."""
_LEVEL_OF: Mapping[str, Level] = dict(zip(RESPONSE_TYPES, LEVELS, strict=True))


@dataclass(frozen=True)
class Label:
    """What one part is. A level that the label does not have is empty."""

    type: str
    """What kind of part it is, such as a screw connection."""
    property: str = ""
    """Which one of its type, such as a brand; only types for which the hierarchy lists properties have one."""
    status: str = ""
    """What else is known of it, such as whether it is installed correctly."""

    def text_of(self, level: Level) -> str:
        """The text of one level, empty where the label does not have it."""
        return getattr(self, level)


@dataclass(frozen=True)
class LabelScheme:
    """Which labels exist, and how a description writes them."""

    hierarchy: Mapping[str, tuple[str, ...]]
    """Object type → its properties; a type with an empty list has none."""
    response_types: tuple[str, ...]
    """The levels that a description writes, in this order; some of RESPONSE_TYPES."""

    def write_description(self, label: Label) -> str:
        """Write the description of a label: the levels that it has, of those in `response_types`, joined by `/`."""
        texts = (label.text_of(level) for level in self._levels())
        return "/".join(text for text in texts if text)

    def parse_description(self, description: str) -> Label:
        """Read a description, of a record or of an answer: the inverse of `write_description`.

        A type with properties is followed by one, whatever the text says there, so that the property of another
        type counts as a wrong property. A type without properties is followed by its status. The text of a type
        that is not in the hierarchy is read as if it had properties. What is left over belongs to the status, slashes
        included.

        Args:
            description: any text; spaces around a level are dropped.
        """
        texts = [text.strip() for text in description.split("/")]
        levels = self._levels()
        without_property = _assign(texts, [level for level in levels if level != "property"])
        if self.hierarchy.get(without_property.type) == ():
            return without_property
        return _assign(texts, levels)

    def _levels(self) -> list[Level]:
        return [_LEVEL_OF[name] for name in self.response_types]


def _assign(texts: Sequence[str], levels: Sequence[Level]) -> Label:
    """Give each level its text by position; the status takes whatever the other levels leave."""
    named = [level for level in levels if level != "status"]
    # Levels before the status count from the start of the text, levels after it from the end.
    start = levels.index("status") if "status" in levels else len(named)
    end = max(start, len(texts) - (len(named) - start))
    values = dict(zip(named, [*texts[:start], *texts[end:]], strict=False))
    status = "/".join(text for text in texts[start:end] if text)
    return Label(values.get("type", ""), values.get("property", ""), status)
