"""Make a temporary folder, print it and leave with 3."""

import sys
import tempfile

print(tempfile.mkdtemp())
sys.exit(3)
