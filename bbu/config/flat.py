"""DirectConfig: the five domains behind one flat namespace (`config.vision_lr`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.config.domains import (
    DOMAINS,
    OWNERS,
    DataConfig,
    DetectionConfig,
    InfrastructureConfig,
    ModelConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class DirectConfig:
    """A loaded run config. `config.key` reads any key of any domain. Configs with equal values are equal."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    detection: DetectionConfig
    infrastructure: InfrastructureConfig
    source: Path = dataclasses.field(compare=False)
    """The file that it was read from."""
    overrides: tuple[str, ...] = dataclasses.field(compare=False, default=())
    """The `key=value` texts that replaced values of the file."""

    def __getattr__(self, key: str) -> Any:
        if key not in OWNERS:
            raise AttributeError(f"no config key {key!r}")
        return getattr(getattr(self, OWNERS[key]), key)

    def as_flat(self) -> dict[str, Any]:
        """Return all keys with their values, in the order of the domains."""
        return {key: getattr(self, key) for key in OWNERS}

    def as_sections(self) -> dict[str, dict[str, Any]]:
        """Return the form in five sections: section → key → value."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in DOMAINS}
