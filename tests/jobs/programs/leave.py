"""A command that ends at once: `leave.py CODE [CAP]`, having stated how often its job may be requeued."""

import sys

from bbu.jobs.task import state_max_requeues

if len(sys.argv) > 2:
    state_max_requeues(int(sys.argv[2]))
sys.exit(int(sys.argv[1]))
