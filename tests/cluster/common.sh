# shellcheck shell=bash disable=SC2034 # the scripts that source this use the names
# Names and small helpers shared by the scripts of the test cluster. Sourced, never run.

: "${BBU_TESTBED:=/opt/bbu-testbed}"
BBU_USER=bbu
STATE=$BBU_TESTBED/state
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ETC=$STATE/etc
LOGS=$STATE/log
SLURM_NODES=(n1 n2)
export SLURM_CONF=$ETC/slurm.conf

say() { printf 'cluster: %s\n' "$*"; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }

# need_root_on_debian: these scripts install packages and start daemons; say so before failing half way.
need_root_on_debian() {
    [ "$(id -u)" = 0 ] || die "must run as root: it installs packages and starts daemons"
    command -v apt-get >/dev/null || die "needs Debian 12 (no apt-get here)"
}

# pid_of NAME: the process id of a daemon we started, if it still runs (pid files outlive reboots).
pid_of() {
    local pid
    pid=$(cat "$STATE/run/$1.pid" 2>/dev/null) || return 1
    grep -q "^${2:-${1%%-*}}" "/proc/$pid/comm" 2>/dev/null && echo "$pid"
}

# wait_for SECONDS WHAT COMMAND...: poll until the command succeeds.
wait_for() {
    local seconds=$1 what=$2 deadline
    shift 2
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || die "$what did not come up in $seconds s; see $LOGS"
        sleep 0.2
    done
}
