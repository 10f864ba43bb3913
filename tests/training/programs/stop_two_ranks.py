"""One of two ranks: `python -m tests.training.programs.stop_two_ranks RANK STORE`.

Rank 1 sends itself a stop signal at step 3. Prints the step at which this rank stops, and whether its own flag is set.
"""

import os
import signal
import sys

from bbu.training.preemption import install_stop_handlers, stop_agreed

STEPS, SIGNALLED_STEP = 6, 3


def main(rank: int, store: str) -> None:
    flag = install_stop_handlers()
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    step = 0
    for step in range(STEPS):
        if step == SIGNALLED_STEP and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        if stop_agreed(flag):
            break
    print(step, flag.is_set)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
