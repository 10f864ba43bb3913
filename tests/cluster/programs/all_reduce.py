"""One rank per node: sums the ranks' numbers over gloo and prints the sum."""

import os

import torch
import torch.distributed as dist

rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo", rank=rank, world_size=world)
number = torch.tensor([rank + 1.0])
dist.all_reduce(number)
print(f"rank {rank} on {os.environ['SLURMD_NODENAME']}: sum {number.item():g}", flush=True)
dist.destroy_process_group()
