"""Entry: draw synthetic BBU rooms in the vendor's format, to try everything without real photos."""

from __future__ import annotations

import argparse
from pathlib import Path

from bbu.errors import run_entry
from bbu.synthetic.rooms import write_rooms


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the rooms."""
    parser = argparse.ArgumentParser(prog="python -m bbu.demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--photos", type=_count, default=32, help="usable photos; two broken ones come on top")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="small suits the tiny model")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--clean", action="store_true", help="leave the dirt out")
    args = parser.parse_args(argv)
    names = write_rooms(args.out, args.photos, args.size, args.seed, dirt=not args.clean)
    print(f"wrote {len(names)} photos to {args.out}" + ("" if args.clean else ", and 2 broken ones"))
    return 0


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of photos")
    return int(text)


if __name__ == "__main__":
    run_entry(main)
