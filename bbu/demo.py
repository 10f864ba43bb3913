"""Entry: draw synthetic BBU rooms in the vendor's format, to try everything without real photos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bbu.config.arguments import positive_int
from bbu.errors import run_entry
from bbu.synthetic.rooms import write_rooms


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the rooms."""
    arguments = _parser().parse_args(argv)
    names = write_rooms(arguments.out, arguments.photos, arguments.size, arguments.seed, dirt=not arguments.clean)
    print(f"wrote {len(names)} photos to {arguments.out}" + ("" if arguments.clean else ", and 2 broken ones"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--photos", type=positive_int, default=32, help="usable photos; two broken ones are added")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="small suits the tiny model")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--clean", action="store_true", help="draw no dirt and no broken photos")
    return parser


if __name__ == "__main__":
    run_entry(main)
