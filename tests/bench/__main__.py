"""`python -m tests.bench [NAME…]`: measure, beside a peer in the same run; no name lists what there is.

A benchmark is a module of this package with a `run() -> str`. Figures are never asserted: machines differ.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path


def names() -> list[str]:
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if not name.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names(), []], metavar="NAME", help=", ".join(names()))
    chosen = parser.parse_args(argv).names
    if not chosen:
        print("\n".join(names()))
    for name in chosen:
        module = importlib.import_module(f"tests.bench.{name}")
        print(f"--- {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        print(module.run(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
