"""Entry: vendor JSON and JPEG in, JSONL records, resized images and a reject report out.

Whole by default; as an array with `--shard I/N` (I from 0) for each task, then once `--merge N`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from bbu.config.arguments import add_config_arguments, config_from_arguments, positive_int
from bbu.conversion.shards import convert_shard, merge_shards
from bbu.errors import ConfigError, run_entry
from bbu.jobs.task import state_max_requeues


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert; raises DataError when too much had to be rejected."""
    arguments = _parser().parse_args(argv)
    run_config = config_from_arguments(arguments, {})
    state_max_requeues(run_config.infrastructure.max_requeues)
    config = run_config.data
    if arguments.shard is not None:
        print(f"wrote {convert_shard(config, *_shard(arguments.shard))}")
        return 0
    if arguments.merge is None:
        convert_shard(config, 0, 1)
    report = merge_shards(config, arguments.merge or 1)
    for name, count in report.written.items():
        print(f"{config.data_root}/{name}: {count} records")
    print(f"photos rejected: {report.photos.rejected or 'none'}, with all objects rejected: {report.photos.emptied}")
    print(f"objects rejected: {report.objects.rejected or 'none'}, clipped: {report.objects.clipped}")
    print(f"files of no photo: {report.files.uncovered or 'none'}")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.convert", description=__doc__)
    add_config_arguments(parser)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shard", metavar="I/N", help="convert shard I (from 0) of N only; merge later")
    part.add_argument("--merge", type=positive_int, metavar="N", help="merge N finished shards")
    return parser


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text}: write I/N with I from 0 to N-1, such as 0/8")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run_entry(main)
