"""A DataLoader whose processes all get Slurm's stop signals in the middle of an epoch.

Prints the number of batches that came, and whether the main process has its flag set.
"""

import os
import subprocess

from bbu.training.preemption import install_stop_handlers, obey_parent_only

BATCHES, SIGNALLED_BATCH = 40, 5


def main() -> None:
    flag = install_stop_handlers()
    from torch.utils.data import DataLoader

    loader = DataLoader(
        range(BATCHES), batch_size=1, num_workers=2, worker_init_fn=obey_parent_only, persistent_workers=True
    )
    batches = 0
    for _ in loader:
        batches += 1
        if batches == SIGNALLED_BATCH:
            workers = [str(worker.pid) for worker in loader._iterator._workers]
            for name in ("USR1", "USR2", "TERM"):  # from another process, as Slurm's
                subprocess.run(["/bin/kill", f"-{name}", str(os.getpid()), *workers], check=True)
    print(batches, flag.is_set)


if __name__ == "__main__":
    main()
