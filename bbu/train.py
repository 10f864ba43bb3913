"""`python -m bbu.train --config NAME`: the training entry.

Only the checks stand so far: `--validate-only` and `--print-config`. Training itself is refused.
"""

from __future__ import annotations

import argparse
import os

import yaml

from bbu.config.arguments import add_config_arguments, config_from_arguments
from bbu.errors import JobError, run_entry


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bbu.train", description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--validate-only", action="store_true", help="check the config and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    config = config_from_arguments(args, os.environ)
    if args.print_config:
        values = config.as_sections() if args.use_new_config else config.as_flat()
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
        return 0
    if args.validate_only:
        print(f"{config.source}: valid, {len(config.as_flat())} keys")
        return 0
    raise JobError("training is not built yet; --validate-only and --print-config work")


if __name__ == "__main__":
    run_entry(main)
