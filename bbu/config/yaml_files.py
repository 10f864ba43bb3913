"""One YAML mapping from a file, in the encodings in which people save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bbu.config.strict_yaml import YamlError, parse_yaml
from bbu.errors import ConfigError

MAX_FILE_BYTES = 100_000
"""Of a YAML file, which takes some seconds to parse; the largest config has 8,000."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping safely. Raises ConfigError for a missing, oversized or malformed file, or a list."""
    if not path.is_file():
        problem = "is a folder; name a file" if path.is_dir() else "no such file; check the name"
        raise ConfigError(f"{path}: {problem}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is not a config")
    data = _parse(path)
    if data is None:
        raise ConfigError(f"{path}: is empty")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return data


def _parse(path: Path) -> Any:
    try:
        return parse_yaml(_decode(path.read_bytes()))
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    except ConfigError as error:  # keys that stand twice
        raise ConfigError(*(f"{path}: {finding}" for finding in error.findings)) from error


def _decode(data: bytes) -> str:
    """The text of a file, which may begin with a byte order mark. Raises YamlError for another encoding than UTF-8."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        advice = "save it as UTF-8 (iconv -f GB18030 -t UTF-8 turns a Chinese Windows file into it)"
        raise YamlError(f"line {line} is not UTF-8 text; {advice}") from error
