"""`base_dependencies.py PYPROJECT`: print the project's dependencies, one a line, as pip reads them."""

import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
