#!/usr/bin/env bash
# The host half of a task: says which rank this is, runs the command in the container, and requeues the job.
#
#   bash slurm/task.sh COMMAND ARGS...
#
# Called once for each rank: by srun from an sbatch template (slurm/job.sh), by submitit under srun and by submitit's
# local executor (bbu/jobs/task.py). It stays outside of the container, where Slurm's commands are.
#
#   BBU_MASTER_SUFFIX  appended to the first node's name to get an address that all nodes resolve (none)
#   BBU_REQUEUE        no: leave with 75 and never requeue the job (yes)
#   BBU_MAX_REQUEUES   how often the job may be requeued as long as COMMAND has not stated it (20). `bbu.submit` sets
#                      it from the run config, for a job that is stopped before COMMAND has read that
#   BBU_SIGNAL_SECONDS how long before its time limit the job gets the stop signal (not known): a job that has no more
#                      time than that is warned of, since it will be stopped as soon as it begins
# and the variables of container.sh.
#
# COMMAND finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for torch.distributed. On rank 0 it also finds
# BBU_REQUEUE_CAP, a file into which it writes max_requeues of its config (state_max_requeues in bbu/jobs/task.py).
#
# Exit code: COMMAND's own, except for 75. 75 (EX_TEMPFAIL) means that the state is saved, or that nothing had begun:
# rank 0 requeues the job, and all ranks leave with 0, since srun (--kill-on-bad-exit) would take any other code for a
# failure and kill the ranks that are still on their way out. 75 from here: rank 0 did not requeue the job. On one
# machine there is no queue, and 75 passes through. 127, refused: not a task, or the node list cannot be read.
set -u

stopped=75                        # PREEMPTED_EXIT_CODE of bbu/errors.py
first_port=20000 port_count=10000 # up to 29999: Linux hands out its ephemeral ports from 32768 on
restart_stride=7919               # a prime far from 0 and from port_count: a restart avoids a port in TIME_WAIT
cap_file=''                       # where COMMAND states its cap, on rank 0

report() { printf 'bbu: %s\n' "$*" >&2; }
fail() { report "$*"; exit 127; }

main() {
    # The stop signals are for COMMAND, and this shell waits for it. What a shell ignores (trap ''), COMMAND would ignore.
    trap : USR1 USR2 TERM
    trap 'rm -f "$cap_file"' EXIT
    set_rank
    [ "$RANK" != 0 ] || { make_cap_file; warn_of_early_signal; }
    bash "$(dirname "${BASH_SOURCE[0]}")/container.sh" "$@" </dev/null
    leave "$?"
}

# set_rank: the variables of torch.distributed's `env://`, from those of srun or of submitit's local executor.
set_rank() {
    if [ -n "${SLURM_PROCID:-}" ]; then
        RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
        WORLD_SIZE=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS} # a step may run on a part of the job
        MASTER_ADDR=$(first_node "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")${BBU_MASTER_SUFFIX:-} || exit
        MASTER_PORT=$(port "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}")
    elif [ -n "${SUBMITIT_LOCAL_GLOBALID:-}" ]; then
        RANK=$SUBMITIT_LOCAL_GLOBALID LOCAL_RANK=$SUBMITIT_LOCAL_LOCALID
        WORLD_SIZE=$SUBMITIT_LOCAL_NTASKS
        MASTER_ADDR=127.0.0.1
        MASTER_PORT=$(port "$SUBMITIT_LOCAL_JOB_ID" 0)
    else
        fail "neither SLURM_PROCID nor SUBMITIT_LOCAL_GLOBALID is set; a task is started by srun or by submitit"
    fi
    export RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
}

# first_node LIST: the first host of a Slurm node list such as n[1-2],m3.
first_node() {
    local node
    read -r node < <(scontrol show hostnames "$1") || fail "scontrol cannot read the node list $1"
    echo "$node"
}

# port JOB RESTARTS: the port of rank 0, the same on every rank, another one for the next job and after a restart.
port() { echo $((first_port + ($1 + restart_stride * $2) % port_count)); }

make_cap_file() {
    cap_file=$(mktemp "${TMPDIR:-/tmp}/bbu-requeue-cap.XXXXXX") ||
        report "cannot write to ${TMPDIR:-/tmp}: max_requeues of the run config is not heard; set TMPDIR"
    export BBU_REQUEUE_CAP=$cap_file
}

# warn_of_early_signal: report it where Slurm sends the stop signal as soon as the job begins.
warn_of_early_signal() {
    local limit seconds=${BBU_SIGNAL_SECONDS:-0}
    [ -n "${SLURM_PROCID:-}" ] && [ "$seconds" -gt 0 ] || return 0
    limit=$(squeue -h -j "$(job_id)" -o %l 2>/dev/null)
    [[ $limit =~ ^(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0 # days, or no limit
    [ $((3600 * 10#0${BASH_REMATCH[2]} + 60 * 10#${BASH_REMATCH[3]} + 10#${BASH_REMATCH[4]})) -gt "$seconds" ] ||
        report "the job's time limit is $limit, and it gets the signal to save $seconds s before that: each start is" \
            "stopped at once; give it more time (--time), or fewer seconds to both --signal and BBU_SIGNAL_SECONDS"
}

# leave CODE: end with the exit code that belongs to COMMAND's.
leave() {
    [ "$1" = "$stopped" ] || exit "$1"
    if [ -z "${SLURM_PROCID:-}" ]; then
        [ "${BBU_REQUEUE:-yes}" = no ] ||
            report "stopped with its state saved; there is no queue here: run the same command again to resume"
        exit "$stopped"
    fi
    [ "$RANK" = 0 ] || exit 0
    [ "${BBU_REQUEUE:-yes}" != no ] || exit "$stopped"
    requeue "$(job_id)" "$(max_requeues)" "${SLURM_RESTART_COUNT:-0}" || exit "$stopped"
    exit 0
}

# requeue JOB CAP RESTARTS: requeue the job unless it was restarted CAP times already, or Slurm is ending it.
requeue() {
    local job=$1 cap=$2 restarts=$3 state reason
    if [ "$restarts" -ge "$cap" ]; then
        report "job $job was restarted $restarts times, the most allowed (max_requeues); not requeued"
        return 1
    fi
    # A job that is cancelled, or requeued by hand, gets the same TERM as one that is preempted. Only its state tells
    # them apart, and a cancelled job must not come back.
    state=$(job_state "$job")
    case $state in
        RUNNING | SIGNALING | unanswered) ;;
        *) report "job $job is ${state:-gone}: Slurm is ending it, so it is not requeued from here"; return 1 ;;
    esac
    if ! reason=$(scontrol requeue "$job" 2>&1); then
        report "scontrol requeue $job failed: $reason; submit the job again to resume"
        return 1
    fi
    report "job $job saved its state and is requeued (restart $((restarts + 1)) of $cap)"
}

# max_requeues: what COMMAND stated; else what came with the job; else the cap of the shipped run configs.
max_requeues() {
    local stated=''
    [ -z "$cap_file" ] || read -r stated <"$cap_file"
    [[ $stated =~ ^[0-9]+$ ]] || stated=${BBU_MAX_REQUEUES:-20}
    echo "$stated"
}

# job_id: this job as scontrol names it. The last element of an array to start has the array's own number as
# SLURM_JOB_ID, and requeueing that number would requeue all its siblings.
job_id() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# job_state JOB: Slurm's state of the job, queried three times, since a controller may be busy; then `unanswered`.
job_state() {
    local state pause
    for pause in 1 3 0; do
        state=$(squeue -h -j "$1" -o %T 2>/dev/null) && echo "$state" && return
        sleep "$pause"
    done
    echo unanswered
}

main "$@"
