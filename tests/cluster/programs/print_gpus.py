"""Print this rank and how many GPUs its node has for the job."""

import os

print("rank", os.environ["RANK"], "of", os.environ["SLURM_GPUS_ON_NODE"], "GPUs", flush=True)
