"""`import_modules.py NAME...`: import modules, and fail if one is missing."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
