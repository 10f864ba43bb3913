"""`python -m tests.fuzz --records 20000 [--seed N] [READER…]`: hostile input for every reader, and a table of outcomes.

Exit code 1 if any input ended in a traceback or hung.
"""

from __future__ import annotations

import argparse
import resource
import sys

from tabulate import tabulate

from tests.fuzz.readers import Reader, readers
from tests.fuzz.trial import Tally, try_reader

_EXAMPLES = 5
"""Bad inputs of a reader that are printed."""


def shares(chosen: list[Reader], records: int) -> list[int]:
    """How many of `records` inputs each reader gets: less where each costs more, at least one."""
    weights = [1 / reader.cost for reader in chosen]
    return [max(1, -int(-records * weight // sum(weights))) for weight in weights]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--records", type=int, default=20_000, help="inputs in all (20000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs (0)")
    names = [reader.name for reader in readers()]
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="READER", help=", ".join(names))
    arguments = parser.parse_args()
    chosen = [reader for reader in readers() if not arguments.names or reader.name in arguments.names]
    tallies = []
    for reader, records in zip(chosen, shares(chosen, arguments.records), strict=True):
        tallies.append(try_reader(reader, records, arguments.seed))
        print("\n".join(tallies[-1].examples[:_EXAMPLES]), end="\n" if tallies[-1].examples else "", flush=True)
    print(table_of(tallies))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return int(any(tally.tracebacks or tally.hangs for tally in tallies))


def table_of(tallies: list[Tally]) -> str:
    """One line for each reader and one for all."""
    rows = [[t.reader, t.records, t.accepted, t.refused, t.slowest, t.hangs, t.tracebacks] for t in tallies]
    columns = list(zip(*rows, strict=True))
    rows.append(["all", *(sum(column) for column in columns[1:4]), max(columns[4]), sum(columns[5]), sum(columns[6])])
    names = ["reader", "records", "accepted", "typed errors", "slowest s", "hangs", "tracebacks"]
    return tabulate(rows, headers=names, floatfmt=".3f")


if __name__ == "__main__":
    sys.exit(main())
