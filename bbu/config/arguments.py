"""The command-line arguments every entry shares, and the config they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config

ENVIRONMENT = {"BBU_DEEPSPEED_ENABLED": "deepspeed_enabled", "BBU_DEEPSPEED_CONFIG": "deepspeed_config"}
"""Variable → the key it overrides; the command line comes after and wins."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config, --use-new-config, --set, --log_level and --log_verbose."""
    parser.add_argument("--config", required=True, help="a name under configs/ or a path")
    parser.add_argument("--use-new-config", action="store_true", help="the file is in five sections")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (repeatable)", dest="overrides"
    )
    parser.add_argument("--log_level", help="same as --set log_level=…")
    parser.add_argument("--log_verbose", help="same as --set log_verbose=…")


def config_from_arguments(args: argparse.Namespace, environ: Mapping[str, str]) -> DirectConfig:
    """Load the config the arguments and the environment ask for. Raises ConfigError with every finding."""
    overrides = [f"{key}={environ[name]}" for name, key in ENVIRONMENT.items() if environ.get(name)]
    overrides += args.overrides
    overrides += [f"{k}={getattr(args, k)}" for k in ("log_level", "log_verbose") if getattr(args, k) is not None]
    return load_config(args.config, overrides=overrides, use_new=args.use_new_config)
