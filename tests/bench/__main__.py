"""`python -m tests.bench [NAME…]`: measure beside a peer in the same run; without a name, list the benchmarks.

A benchmark is a module of this package with a `run() -> str`. Figures are never asserted: machines differ.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path


def list_benchmarks() -> list[str]:
    """Names of the modules of this package that measure something."""
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in modules if not name.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    benchmarks = list_benchmarks()
    parser.add_argument("names", nargs="*", choices=[*benchmarks, []], metavar="NAME", help=", ".join(benchmarks))
    names = parser.parse_args(argv).names
    if not names:
        print("\n".join(benchmarks))
    for name in names:
        module = importlib.import_module(f"tests.bench.{name}")
        print(f"--- {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        print(module.run(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
