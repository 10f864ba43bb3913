"""The command-line arguments that several entries have, and the run config that they name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.errors import ConfigError
from bbu.schema import SOURCES, Source

_ENVIRONMENT_KEYS = {"BBU_DEEPSPEED_ENABLED": "deepspeed_enabled", "BBU_DEEPSPEED_CONFIG": "deepspeed_config"}
"""Environment variable → the key that it overrides; overrides of the command line win."""

DEFAULT_CLUSTER = "local"
"""The profile that serves where none is named: this machine."""
_SWITCH_WORDS = {"1": "true", "true": "true", "yes": "true", "on": "true"}
_SWITCH_WORDS |= {"0": "false", "false": "false", "no": "false", "off": "false"}
"""What a variable may say, in lower case → the value of its key."""


def add_config_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, description: str = "a name under configs, or a path"
) -> None:
    """Add --config, --use-new-config and --set.

    Args:
        parser: the entry's parser.
        required: refuse a command line without --config.
        description: the help of --config, with what serves where it is left out.
    """
    parser.add_argument("--config", metavar="NAME", required=required, help=description)
    parser.add_argument("--use-new-config", action="store_true", help="the config is in five sections")
    add_override_argument(parser)


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """Add --set KEY=VALUE, which may be repeated; the texts are in `overrides`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key (repeatable)"
    )


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --log_level and --log_verbose."""
    parser.add_argument("--log_level", help="same as --set log_level=…")
    parser.add_argument("--log_verbose", help="same as --set log_verbose=…")


def add_cluster_argument(parser: argparse.ArgumentParser) -> None:
    """Add --cluster, the name of a cluster profile; None where neither it nor BBU_CLUSTER names one."""
    parser.add_argument(
        "--cluster",
        default=os.environ.get("BBU_CLUSTER") or None,
        metavar="NAME",
        help=f"a profile under configs/clusters, or a path (BBU_CLUSTER, else {DEFAULT_CLUSTER}: this machine)",
    )


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")


def add_checkpoint_argument(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Add --checkpoint to a parser or to a group of it; `required` is for a parser."""
    folder = "a checkpoint-{step} folder of a run"
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", required=required, help=folder)


def add_prediction_arguments(parser: argparse.ArgumentParser, *, source: Source | None, source_text: str) -> None:
    """Add --source and --teachers: how predictions are made.

    Args:
        parser: the entry's parser.
        source: the source where --source is left out.
        source_text: the end of the help of --source: what serves where it is left out.
    """
    text = f"query the answer, the head, or both together ({source_text})"
    parser.add_argument("--source", choices=SOURCES, default=source, help=text)
    parser.add_argument("--teachers", type=int, default=0, metavar="N", help="worked examples before each photo (0)")


def positive_int(text: str) -> int:
    """Read a whole number above 0, as the `type` of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def config_from_arguments(arguments: argparse.Namespace, environ: Mapping[str, str]) -> DirectConfig:
    """Load the run config that the command line and the environment name.

    Args:
        arguments: parsed arguments of `add_config_arguments`, and of `add_log_arguments` where the entry has them.
        environ: the environment variables; see `_ENVIRONMENT_KEYS`.

    Raises:
        ConfigError: carries all findings.
    """
    overrides = [*_environment_overrides(environ), *arguments.overrides]
    log_keys = {key: getattr(arguments, key, None) for key in ("log_level", "log_verbose")}
    overrides += [f"{key}={value}" for key, value in log_keys.items() if value is not None]
    return load_config(arguments.config, overrides=overrides, use_new=arguments.use_new_config)


def _environment_overrides(environ: Mapping[str, str]) -> list[str]:
    """The overrides that the environment states. Raises ConfigError that names the variable."""
    texts = {name: environ[name] for name in _ENVIRONMENT_KEYS if environ.get(name)}
    switch = texts.get("BBU_DEEPSPEED_ENABLED", "true")
    if switch.lower() not in _SWITCH_WORDS:
        raise ConfigError(f"the variable BBU_DEEPSPEED_ENABLED is {switch!r}; set it to true or false, or unset it")
    if "BBU_DEEPSPEED_ENABLED" in texts:
        texts["BBU_DEEPSPEED_ENABLED"] = _SWITCH_WORDS[switch.lower()]
    return [f"{_ENVIRONMENT_KEYS[name]}={text}" for name, text in texts.items()]
