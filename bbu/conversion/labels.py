"""Turns a vendor's raw texts into one description: the token map renames each text, the label scheme checks it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

from bbu.config.domains import DataConfig, Language
from bbu.config.kinds import nearest_valid
from bbu.config.label_files import load_label_scheme, read_label_file
from bbu.conversion.rejects import Unusable
from bbu.conversion.vendor import LABEL_KEY_EN, LABEL_KEY_ZH, VendorObject
from bbu.errors import DataError
from bbu.labels import Label, LabelScheme


@dataclass(frozen=True)
class LabelRules:
    """How raw texts become a description."""

    token_map: dict[str, str]
    """The vendor's text of one level → this project's text."""
    scheme: LabelScheme
    """Which labels exist, and which of their levels a description writes."""
    language: Language
    """Which of the vendor's texts are read: zh or en."""

    def describe(self, item: VendorObject) -> str:
        """Write the description of one object.

        Raises:
            Unusable: the object has no label in this language, or its label is not in the hierarchy.
        """
        texts, label_key = self._texts_of(item)
        if label_key not in texts:
            raise Unusable("missing_label", f"no text under {label_key!r} for language {self.language!r}")
        tokens = [self._rename(part) for part in self._split(texts[label_key])]
        if not tokens:
            raise Unusable("missing_label", f"{texts[label_key]!r} names nothing")
        # A slash inside another text would read as one more level.
        others = [self._rename(text).replace("/", "、") for key, text in texts.items() if key != label_key]
        return self.scheme.write_description(self._label(tokens, others))

    def respelled(self, item: VendorObject) -> list[str]:
        """Return the object's label where the label files write it with other brackets or widths, else nothing."""
        texts, label_key = self._texts_of(item)
        label = texts.get(label_key, "")
        parts = self._split(label)
        is_same = "/".join(parts) == "/".join(_levels(label, "/")) and not any(map(self._is_respelled, parts))
        return [] if is_same else [label]

    def _texts_of(self, item: VendorObject) -> tuple[dict[str, str], str]:
        """(texts, the key among them that holds the label) in the language of the rules."""
        return (item.content_zh, LABEL_KEY_ZH) if self.language == "zh" else (item.content, LABEL_KEY_EN)

    def _split(self, label: str) -> list[str]:
        """The levels of a label; a full-width slash divides them where the type is not known otherwise."""
        levels = _levels(label, "/")
        is_type = bool(levels) and self._rename(levels[0]) in self.scheme.hierarchy
        return levels if is_type else _levels(label, "[/／]")

    def _label(self, tokens: list[str], others: list[str]) -> Label:
        object_type, *rest = tokens
        if object_type not in self.scheme.hierarchy:
            near = nearest_valid(object_type, [*self.scheme.hierarchy, *self.token_map])
            raise Unusable("unknown_object_type", f"{object_type!r} is not in the label hierarchy{near}")
        properties = self.scheme.hierarchy[object_type]
        if not properties:
            extras = ",".join(rest[1:] + others)
            return Label(object_type, status="/".join(text for text in (*rest[:1], extras) if text))
        name = rest[0] if rest else ""
        if name not in properties:
            near = nearest_valid(name, properties)
            raise Unusable("unknown_property", f"{name!r} is not a property of {object_type!r}{near}")
        return Label(object_type, name, ",".join(rest[1:] + others))

    def _rename(self, token: str) -> str:
        name = token.strip()
        return self._by_shape.get(_shape(name), name) if self._is_respelled(name) else self.token_map.get(name, name)

    def _is_respelled(self, token: str) -> bool:
        """Whether the label files know a text only in another shape."""
        return token not in self._names and _shape(token) in self._by_shape

    @cached_property
    def _names(self) -> frozenset[str]:
        """All texts that the label files write, on both sides of the token map."""
        properties = (name for names in self.scheme.hierarchy.values() for name in names)
        return frozenset([*self.token_map, *self.token_map.values(), *self.scheme.hierarchy, *properties])

    @cached_property
    def _by_shape(self) -> dict[str, str]:
        """Shape → this project's text, of the shapes that have one meaning."""
        meanings: dict[str, set[str]] = {}
        for name in self._names:
            meanings.setdefault(_shape(name), set()).add(self.token_map.get(name, name))
        return {shape: texts.pop() for shape, texts in meanings.items() if len(texts) == 1}


def _levels(label: str, slash: str) -> list[str]:
    return [part.strip() for part in re.split(slash, label) if part.strip()]


def _shape(text: str) -> str:
    """A text without differences that a reader does not see: brackets and letters in half width, no invisible signs."""
    plain = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    return " ".join(plain.split())


def load_rules(config: DataConfig) -> LabelRules:
    """Read the label files that a config names; raises ConfigError or DataError in one line per problem."""
    scheme = load_label_scheme(config)
    names = [*scheme.hierarchy, *(name for names in scheme.hierarchy.values() for name in names)]
    for name in names:
        if not name or name != name.strip() or "/" in name:
            raise DataError(
                f"{config.label_hierarchy_file}: {name!r} can be no level of a label; leave out slashes, and spaces "
                "around it"
            )
    return LabelRules(_load_token_map(config), scheme, config.language)


def _load_token_map(config: DataConfig) -> dict[str, str]:
    token_map = read_label_file(config.token_map_file)
    for source, target in token_map.items():
        if not isinstance(target, str) or not target:
            raise DataError(f"{config.token_map_file}: {source!r} must map to a text, not {target!r}; correct it")
    return token_map
