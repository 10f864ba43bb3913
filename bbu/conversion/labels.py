"""Turns a vendor's raw texts into one description: token maps rename, response types choose the levels,
and the label hierarchy says which descriptions exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bbu.config.domains import DataConfig
from bbu.config.read import CONFIG_DIR, read_yaml, resolve_config_path
from bbu.conversion.vendor import LABEL_KEY_EN, LABEL_KEY_ZH, Unusable, VendorObject
from bbu.errors import DataError

LABELS_FOLDER = CONFIG_DIR / "labels"
LEVELS = ("object_type", "property", "extra_info")


@dataclass(frozen=True)
class LabelRules:
    """How raw texts become a description. `hierarchy`: object type → its properties, empty for any."""

    token_map: dict[str, str]
    hierarchy: dict[str, tuple[str, ...]]
    response_types: tuple[str, ...]
    language: str

    def describe(self, item: VendorObject) -> str:
        """`object_type/property/extra_info` of one object; Unusable names why it has none."""
        texts, label_key = (item.content_zh, LABEL_KEY_ZH) if self.language == "zh" else (item.content, LABEL_KEY_EN)
        if label_key not in texts:
            raise Unusable("missing_label", f"no text under {label_key!r} for language {self.language!r}")
        levels = self._levels(texts, label_key)
        self._check(levels["object_type"], levels["property"])
        return "/".join(levels[level] for level in self.response_types if levels[level])

    def _levels(self, texts: dict[str, str], label_key: str) -> dict[str, str]:
        tokens = [self._rename(part) for part in texts[label_key].split("/") if part.strip()]
        if not tokens:
            raise Unusable("missing_label", f"{texts[label_key]!r} names nothing")
        extras = tokens[2:] + [self._rename(text) for key, text in texts.items() if key != label_key]
        # A slash inside a text would read as one more level.
        extra_info = ",".join(text.replace("/", "、") for text in extras)
        return {"object_type": tokens[0], "property": (tokens[1:2] or [""])[0], "extra_info": extra_info}

    def _rename(self, token: str) -> str:
        return self.token_map.get(token.strip(), token.strip())

    def _check(self, object_type: str, prop: str) -> None:
        if object_type not in self.hierarchy:
            raise Unusable("unknown_object_type", f"{object_type!r} is not in the label hierarchy")
        allowed = self.hierarchy[object_type]
        if allowed and prop not in allowed:
            raise Unusable("unknown_property", f"{prop!r} is not a property of {object_type!r}")


def load_rules(config: DataConfig) -> LabelRules:
    """Read the two label files a config names; raises DataError in one line per problem."""
    token_map = _read_labels(config.token_map_file)
    hierarchy = _read_labels(config.label_hierarchy_file)
    for source, target in token_map.items():
        if not isinstance(target, str) or not target:
            raise DataError(f"{config.token_map_file}: {source!r} must map to a text, not {target!r}; correct it")
    for object_type, properties in hierarchy.items():
        if not isinstance(properties, list) or not all(isinstance(p, str) for p in properties):
            raise DataError(f"{config.label_hierarchy_file}: {object_type!r} must list its properties ([] for any)")
    allowed = {object_type: tuple(properties) for object_type, properties in hierarchy.items()}
    return LabelRules(token_map, allowed, _check_levels(config.response_types), config.language)


def _check_levels(levels: Sequence[str]) -> tuple[str, ...]:
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or "object_type" not in levels:
        raise DataError(f"response_types {list(levels)}: choose from {', '.join(LEVELS)}, object_type among them")
    return tuple(levels)


def _read_labels(name: str) -> dict[str, Any]:
    return read_yaml(resolve_config_path(name, LABELS_FOLDER))
