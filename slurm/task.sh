#!/usr/bin/env bash
# One task of an sbatch template: tell torch.distributed which rank this is, and enter the container.
#
#   srun bash slurm/task.sh COMMAND ARGS...      (MASTER_ADDR and MASTER_PORT come from slurm/job.sh)
set -u

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec bash "$BBU_HOME/slurm/container.sh" "$@"
