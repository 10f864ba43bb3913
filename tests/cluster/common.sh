# shellcheck shell=bash disable=SC2034 # the scripts that source this use the names
# Names and small helpers shared by the scripts of the test clusters. Sourced, never run, with CLUSTER set.

: "${BBU_TESTBED:=/opt/bbu-testbed}"
BBU_USER=bbu
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf 'cluster: %s\n' "$*"; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }

# How the two clusters differ. They share the packages, Apptainer, the images and the user; each has its own daemons.
case $CLUSTER in
    bbu) # Debian 12's own Slurm (22.05), with accounting
        STATE=$BBU_TESTBED/state ENV_FILE=$BBU_TESTBED/env.sh ACCOUNTING=yes
        SLURM_NODES=(n1 n2) NODE_PORTS=17001-17002 CTLD_PORT=17817
        SLURM_HOME='' SLURM_PATH='' SLURMD_OPTIONS=()
        ;;
    newer) # Slurm 24.11, unpacked beside the system's, without accounting
        STATE=$BBU_TESTBED/newer ENV_FILE=$BBU_TESTBED/env-newer.sh ACCOUNTING=no
        SLURM_NODES=(m1 m2) NODE_PORTS=17011-17012 CTLD_PORT=17827
        SLURM_HOME=$BBU_TESTBED/slurm-24.11
        SLURM_PATH=$SLURM_HOME/usr/bin:$SLURM_HOME/usr/sbin: # before everything else on a PATH
        SLURMD_OPTIONS=(-d "$SLURM_HOME/usr/sbin/slurmstepd")
        ;;
    *) die "no cluster is called $CLUSTER; give newer, or nothing for the first one" ;;
esac
ETC=$STATE/etc
LOGS=$STATE/log
export SLURM_CONF=$ETC/slurm.conf PATH=$SLURM_PATH$PATH

has_accounting() { [ "$ACCOUNTING" = yes ]; }

# need_root_on_debian: these scripts install packages and start daemons; say so before failing half way.
need_root_on_debian() {
    [ "$(id -u)" = 0 ] || die "must run as root: it installs packages and starts daemons"
    command -v apt-get >/dev/null || die "needs Debian 12 (no apt-get here)"
}

# pid_of NAME: the process id of a daemon we started, if it still runs (pid files outlive reboots).
pid_of() {
    local pid
    pid=$(cat "$STATE/run/$1.pid" 2>/dev/null) || return 1
    grep -q "^${2:-${1%%-*}}" "/proc/$pid/comm" 2>/dev/null || return 1
    ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" && echo "$pid" # one that was killed and nobody has reaped yet
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
