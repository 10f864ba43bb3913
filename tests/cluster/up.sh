#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this machine, with accounting, and Apptainer for an ordinary user.
#
#   sudo tests/cluster/up.sh        # install what is missing, start what is not running
#   sudo su - bbu                   # then: sinfo, sbatch, apptainer, ... as on a login node
#   sudo tests/cluster/down.sh      # stop it; everything stays under $BBU_TESTBED for the next time
#
# `up.sh newer` and `down.sh newer` do the same for a second cluster beside it: Slurm 24.11, without accounting
# and with scrontab. Its users source $BBU_TESTBED/env-newer.sh.
#
# Needs root on Debian 12. All files live under $BBU_TESTBED (/opt/bbu-testbed), apart from the Debian
# packages, the user, and one line a cluster in /etc/hosts.
set -euo pipefail
umask 022
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLUSTER=${1:-bbu}
# shellcheck source=common.sh
. "$here/common.sh"
# shellcheck source=install.sh
. "$here/install.sh"
# shellcheck source=services.sh
. "$here/services.sh"

need_root_on_debian
mkdir -p "$LOGS"
exec 9>"$BBU_TESTBED/up.lock"
flock 9 # two test sessions may start at once; daemons must not inherit the lock (see 9>&- below)
install_packages
install_apptainer
[ -z "$SLURM_HOME" ] || install_slurm "$SLURM_HOME"
create_user
make_login_venv
write_env
{
    write_configuration
    start_services
} 9>&-
say "up: $(sinfo -h -o '%D nodes, %T, partition %R'); user $BBU_USER; prefix $BBU_TESTBED"
