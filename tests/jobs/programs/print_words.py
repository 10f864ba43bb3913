"""A command that prints its arguments."""

import sys

print(*sys.argv[1:], flush=True)
