"""A command that fails with 9 on rank 1 and runs for long on the others."""

import os
import time

if os.environ["RANK"] == "1":
    os._exit(9)
time.sleep(300)
