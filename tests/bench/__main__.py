"""`python -m tests.bench [NAME…]`: measure beside a peer in the same run; without a name, list the benchmarks.

A benchmark is a module of this package with a `run()`, which returns a list of rows or a text. RESULTS.md keeps the
newest result of each. Figures are never asserted: machines differ.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from tests.bench._results import format_rows, record_result


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
        run_benchmark(name)
    return 0


def run_benchmark(name: str) -> None:
    """Run one benchmark, print its result and record it."""
    module = importlib.import_module(f"tests.bench.{name}")
    summary = (module.__doc__ or "").splitlines()[0]
    print(f"--- {name}: {summary}", flush=True)
    result = module.run()
    print(result if isinstance(result, str) else format_rows(result, "simple"), flush=True)
    record_result(name, summary, f"```\n{result}\n```" if isinstance(result, str) else format_rows(result))


if __name__ == "__main__":
    sys.exit(main())
