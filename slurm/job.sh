# shellcheck shell=bash
# What the sbatch templates share: they source it in the batch shell. Needs bash and srun alone.
#
#   BBU_HOME   the checkout (default: the folder sbatch was called in)
# and the variables of task.sh and container.sh, which stand at the head of those files.

export BBU_HOME=${BBU_HOME:-$SLURM_SUBMIT_DIR}

# run_tasks COMMAND...: run the command in the container, once for each task of the job; returns its exit code.
run_tasks() {
    # The batch shell must outlive the stop signals. It waits in the foreground, so a trap runs after srun has ended.
    trap : USR1 USR2 TERM
    # Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch.
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        bash "$BBU_HOME/slurm/task.sh" "$@"
}
