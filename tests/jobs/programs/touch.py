"""A command that makes an empty file: `touch.py FILE`."""

import sys
from pathlib import Path

Path(sys.argv[1]).touch()
