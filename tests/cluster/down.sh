#!/usr/bin/env bash
# Stop the test cluster that up.sh started. `down.sh --purge` also removes its jobs, accounting and logs;
# packages, Apptainer, images and the user's files stay.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"
# shellcheck source=services.sh
. "$here/services.sh"

no_jobs() { [ -z "$(squeue -h)" ]; }

need_root_on_debian
if [ -f "$SLURM_CONF" ] && pid_of slurmctld >/dev/null; then
    scancel --user="$BBU_USER" 2>/dev/null || true # steps would outlive their slurmd
    wait_for 30 "the end of all jobs" no_jobs
fi
stop_services
# a job that was killed outright leaves its image served, since the server must outlive all other signals
pkill -KILL -u "$BBU_USER" -x squashfuse_ll 2>/dev/null || true
[ "${1:-}" != --purge ] || rm -rf "$STATE"
say "down"
