"""Asking Slurm to run a job again: outside the container, under a cap, by one rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm has started this job again (0 on the first start, and without Slurm)."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def requeue(environ: Mapping[str, str], max_requeues: int) -> bool:
    """Put the running Slurm job back into the queue unless it has been there `max_requeues` times; say so.

    Returns False, with the reason on standard error, if it was not put back. On success Slurm kills the
    job's processes within moments.
    """
    job, restarts = environ["SLURM_JOB_ID"], restart_count(environ)
    if restarts >= max_requeues:
        tell(f"job {job} was restarted {restarts} times, the most allowed (max_requeues); not requeued")
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        tell(f"scontrol requeue {job} could not run: {error}; submit the job again to go on")
        return False
    if done.returncode:
        tell(f"scontrol requeue {job} failed: {done.stderr.strip()}; submit the job again to go on")
        return False
    tell(f"job {job} saved its state and is requeued (restart {restarts + 1} of {max_requeues})")
    return True


def tell(text: str) -> None:
    print(f"bbu: {text}", file=sys.stderr, flush=True)
