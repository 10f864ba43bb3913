"""Turns a vendor's raw texts into one description: the token map renames each text, the label scheme checks it."""

from __future__ import annotations

from dataclasses import dataclass

from bbu.config.domains import DataConfig, Language
from bbu.config.label_files import load_label_scheme, read_label_file
from bbu.conversion.vendor import LABEL_KEY_EN, LABEL_KEY_ZH, Unusable, VendorObject
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
        texts, label_key = (item.content_zh, LABEL_KEY_ZH) if self.language == "zh" else (item.content, LABEL_KEY_EN)
        if label_key not in texts:
            raise Unusable("missing_label", f"no text under {label_key!r} for language {self.language!r}")
        tokens = [self._rename(part) for part in texts[label_key].split("/") if part.strip()]
        if not tokens:
            raise Unusable("missing_label", f"{texts[label_key]!r} names nothing")
        # A slash inside another text would read as one more level.
        others = [self._rename(text).replace("/", "、") for key, text in texts.items() if key != label_key]
        return self.scheme.write_description(self._label(tokens, others))

    def _label(self, tokens: list[str], others: list[str]) -> Label:
        object_type, *rest = tokens
        if object_type not in self.scheme.hierarchy:
            raise Unusable("unknown_object_type", f"{object_type!r} is not in the label hierarchy")
        properties = self.scheme.hierarchy[object_type]
        if not properties:
            extras = ",".join(rest[1:] + others)
            return Label(object_type, status="/".join(text for text in (*rest[:1], extras) if text))
        name = rest[0] if rest else ""
        if name not in properties:
            raise Unusable("unknown_property", f"{name!r} is not a property of {object_type!r}")
        return Label(object_type, name, ",".join(rest[1:] + others))

    def _rename(self, token: str) -> str:
        return self.token_map.get(token.strip(), token.strip())


def load_rules(config: DataConfig) -> LabelRules:
    """Read the label files that a config names; raises ConfigError or DataError in one line per problem."""
    return LabelRules(_load_token_map(config), load_label_scheme(config), config.language)


def _load_token_map(config: DataConfig) -> dict[str, str]:
    token_map = read_label_file(config.token_map_file)
    for source, target in token_map.items():
        if not isinstance(target, str) or not target:
            raise DataError(f"{config.token_map_file}: {source!r} must map to a text, not {target!r}; correct it")
    return token_map
