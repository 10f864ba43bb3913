"""A command that a KILL ends."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
