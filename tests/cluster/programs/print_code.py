"""Print which code is imported, and its commit as slurm/container.sh states it."""

import os

import bbu

print(bbu.__file__, os.environ["BBU_COMMIT"])
