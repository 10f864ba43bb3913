"""`python -m tests.run.lease_holder RUN [JOB_ID]`: after a line on stdin tries to take a run folder, prints `held` or
`refused`, and waits for another line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder
from bbu.run.lease import Owner, take_run_lease


def main(run: str, job_id: str = "local") -> None:
    sys.stdin.readline()
    try:
        take_run_lease(RunFolder(Path(run)), Owner.of_this_process({"SLURM_JOB_ID": job_id}), timeout_s=60)
    except CheckpointError:
        print("refused", flush=True)
    else:
        print("held", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
