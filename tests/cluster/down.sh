#!/usr/bin/env bash
# Stop the test cluster that up.sh started (`down.sh newer`: the one of `up.sh newer`). With --purge, also remove
# its jobs, accounting and logs; packages, programs, images and the user's files stay.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLUSTER=bbu purge=no
for argument in "$@"; do
    case $argument in --purge) purge=yes ;; *) CLUSTER=$argument ;; esac
done
# shellcheck source=common.sh
. "$here/common.sh"
# shellcheck source=services.sh
. "$here/services.sh"

# image_servers: the processes that serve images to this cluster's jobs; the other cluster's may be at work.
image_servers() {
    local pid
    for pid in $(pgrep -u "$BBU_USER" -x squashfuse_ll); do
        ! grep -qszxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" || echo "$pid"
    done
}

need_root_on_debian
# steps would outlive their slurmd
if [ -f "$SLURM_CONF" ] && pid_of slurmctld >/dev/null; then cancel_jobs; fi
stop_services
# a job that was killed outright leaves its image served, since the server must outlive all other signals
image_servers | xargs -r kill -KILL 2>/dev/null || true
[ "$purge" = no ] || rm -rf "$STATE"
say "down"
