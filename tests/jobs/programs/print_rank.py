"""A command that prints its place among the ranks, and what it would read from standard input."""

import os
import sys

names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
print(*(os.environ[name] for name in names), repr(sys.stdin.read()), flush=True)
