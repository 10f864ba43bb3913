#!/usr/bin/env bash
# One task of an sbatch template: tell torch.distributed which rank this is, enter the container, and mind the end.
#
#   srun bash slurm/task.sh COMMAND ARGS...      (MASTER_ADDR and MASTER_PORT come from slurm/job.sh)
#
# Code 75 says that state is saved: rank 0 puts the job back into the queue, and the others say nothing. A code
# other than 0 from the first rank to end would have srun kill the ranks that are still on their way out, and the
# job would end with that kill's code.
set -u
trap : USR1 USR2 TERM # they are the program's; the shell waits for it
# shellcheck source=slurm/job.sh
. "$BBU_HOME/slurm/job.sh"

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
bash "$BBU_HOME/slurm/container.sh" "$@"
code=$?
[ "$code" = 75 ] || exit "$code"
[ "$RANK" = 0 ] || exit 0
requeue || exit 75
