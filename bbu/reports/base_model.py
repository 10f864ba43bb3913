"""The model that a training starts from: its name on the hub and its licence, as far as its folder states them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.strict_yaml import YamlError, parse_yaml
from bbu.errors import ConfigError

_QWEN = re.compile(r"Qwen2\.5-VL-(3B|7B|32B|72B)-Instruct")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""A folder of the hub's cache: `models--{owner}--{name}/snapshots/{commit}`."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LINK = "https://huggingface.co/Qwen/Qwen2.5-VL-{size}-Instruct/blob/main/LICENSE"
_QWEN_LICENCES = {
    "3B": {"license": "other", "license_name": "qwen-research", "license_link": _LINK.format(size="3B")},
    "7B": {"license": "apache-2.0"},
    "32B": {"license": "apache-2.0"},
    "72B": {"license": "other", "license_name": "qwen", "license_link": _LINK.format(size="72B")},
}
"""As the hub's model cards of Qwen2.5-VL stated them in 2025."""
_LICENCE_KEYS = ("license", "license_name", "license_link")
_LICENCE_FILES = ("LICENSE", "NOTICE")
_MAX_CARD = 2**20
"""Characters of a model card that are read."""


@dataclass(frozen=True)
class BaseModel:
    """The model that a training starts from."""

    name: str
    """What a person calls it: its name on the hub, else that of its folder"""
    hub_id: str | None
    """`owner/name` on the hub; None where it is not known"""
    licence: Mapping[str, str]
    """Its licence in the words of the hub (`license`, `license_name`, `license_link`)"""
    licence_files: Mapping[str, bytes]
    """Texts of its licence, by the name of the file"""

    @property
    def licence_text(self) -> str:
        """The licence as a sentence."""
        if self.licence["license"] == "unknown":
            return "The folder of the base model states no licence: look it up before you pass these weights on."
        name = self.licence.get("license_name", self.licence["license"])
        link = f", {self.licence['license_link']}" if "license_link" in self.licence else ""
        return f"These weights are derived from {self.name}, whose licence is {name}{link}."


def describe_base_model(folder: Path) -> BaseModel:
    """Describe a model folder by its model card, else by its name."""
    card = _front_matter(folder / "README.md")
    hub_id = _hub_id(folder, card)
    named = {key: card[key] for key in _LICENCE_KEYS if isinstance(card.get(key), str)}
    size = _QWEN.search(hub_id or "")
    fallback = _QWEN_LICENCES[size[1]] if size else {"license": "unknown"}
    return BaseModel(
        name=hub_id or folder.resolve().name,
        hub_id=hub_id,
        licence=named if "license" in named else fallback,
        licence_files={name: (folder / name).read_bytes() for name in _LICENCE_FILES if (folder / name).is_file()},
    )


def _hub_id(folder: Path, card: Mapping[str, Any]) -> str | None:
    """Find `owner/name`: a checkpoint of this program states its own base, any other folder may bear the name."""
    base, tags = card.get("base_model"), card.get("tags")
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and isinstance(tags, list) and "bbu" in tags:
        return base
    for part in reversed(folder.resolve().parts):
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
        if match := _QWEN.fullmatch(part):
            return f"Qwen/{match[0]}"
    return None


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the two `---` lines that open a model card; empty where there is none that can be read."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head, *rest = file.read(_MAX_CARD).split("\n---", 1)
    if not head.startswith("---\n") or not rest:
        return {}
    try:
        values = parse_yaml(head[4:])
    except (YamlError, ConfigError):  # somebody else's file: training does not depend on it
        return {}
    return values if isinstance(values, dict) else {}
