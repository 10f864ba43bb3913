# shellcheck shell=bash
# What the sbatch templates and their tasks share; sourced on the nodes, where Slurm's tools are. Needs bash alone.
#
#   BBU_HOME          the checkout (default: the folder sbatch was called in)
#   BBU_MAX_RESTARTS  how often a job that stopped with its state saved is put back into the queue (20; none: never)
# and those of container.sh: BBU_IMAGE, BBU_IMAGE_SHA256, BBU_CODE, BBU_BINDS, BBU_SCRATCH, BBU_SHIELD, BBU_NV.

export BBU_HOME=${BBU_HOME:-$SLURM_SUBMIT_DIR}

# run_tasks COMMAND...: the command in the container, one per task of the job; its code. The batch shell itself
# must outlive the stop signals: it waits in the foreground, so the traps run once srun has ended.
run_tasks() {
    trap : USR1 USR2 TERM
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)${BBU_MASTER_SUFFIX:-}
    # as bbu/jobs/task.py: below the ephemeral ports, another one after a restart
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 10000))
    export MASTER_ADDR MASTER_PORT
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        bash "$BBU_HOME/slurm/task.sh" "$@"
}

# requeue: put this job back into the queue, under a cap. Called by rank 0, whose state is saved.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${BBU_MAX_RESTARTS:-20} job state
    [ "$most" != none ] || return 1
    job=$(own_id)
    if [ "$restarts" -ge "$most" ]; then
        echo "bbu: restarted $restarts times, the most allowed (BBU_MAX_RESTARTS); not requeued" >&2
        return 1
    fi
    # a job that is cancelled gets the same TERM as one that is preempted, and must not come back
    state=$(squeue -h -j "$job" -o %T) || state=RUNNING
    case $state in
        RUNNING | SIGNALING) ;;
        *) echo "bbu: job $job is ${state:-gone}: Slurm is ending it, so it is not requeued from here" >&2; return 1 ;;
    esac
    scontrol requeue "$job" || return 1
    echo "bbu: job $job saved its state and is requeued (restart $((restarts + 1)) of $most)" >&2
}

# own_id: as bbu/jobs/queue.py. The last element of an array to start has the array's number for its own, and
# requeueing that number would take all its siblings along.
own_id() {
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || { echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && return; }
    echo "$SLURM_JOB_ID"
}
