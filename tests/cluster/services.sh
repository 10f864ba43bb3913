# shellcheck shell=bash
# The daemons of a test cluster: munged, mariadbd and slurmdbd (with accounting), slurmctld and one slurmd per
# node, each with its files under $STATE and ports of its own, so that they disturb nothing else on the machine.
# Sourced after common.sh.

DB_PORT=17306 DBD_PORT=17819
MUNGE_SOCKET=$STATE/munge/munge.socket
DB_SOCKET=$STATE/run/mariadb.socket

write_configuration() {
    install -d -m 755 "$ETC" "$STATE/run" "$LOGS"
    install -d -o munge -g munge -m 755 "$STATE/munge"
    install -d -o slurm -g slurm "$STATE/slurm/ctld"
    for node in "${SLURM_NODES[@]}"; do install -d "$STATE/slurm/$node"; done
    chown slurm "$STATE/run" && chmod 1777 "$STATE/run" "$LOGS"
    name_nodes
    write_slurm_conf
    ! has_accounting || write_slurmdbd_conf
}

# gloo resolves the node names that Slurm hands out, and hangs when they do not resolve.
name_nodes() {
    grep -q "[[:space:]]${SLURM_NODES[*]}$" /etc/hosts || echo "127.0.0.1 ${SLURM_NODES[*]}" >>/etc/hosts
}

write_slurm_conf() {
    slurm_conf >"$ETC/slurm.conf.new"
    if ! cmp -s "$ETC/slurm.conf.new" "$ETC/slurm.conf"; then
        mv "$ETC/slurm.conf.new" "$ETC/slurm.conf"
        stop_slurm # a changed configuration is read at start
    fi
    rm -f "$ETC/slurm.conf.new"
    write_gres_conf
    case $CLUSTER in
        bbu) printf 'CgroupAutomount=no\nConstrainCores=no\n' >"$ETC/cgroup.conf" ;;
        newer) write_task_prolog ;;
    esac
}

# slurm_conf: the template with this cluster's values; of the lines that begin with a cluster's name in
# brackets, this cluster's.
slurm_conf() {
    sed -e "s|^\[$CLUSTER\] ||" -e '/^\[[a-z]*\] /d' \
        -e "s|@CLUSTER@|$CLUSTER|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@STATE@|$STATE|g" -e "s|@LOGS@|$LOGS|g" \
        -e "s|@MUNGE_SOCKET@|$MUNGE_SOCKET|g" -e "s|@CTLD_PORT@|$CTLD_PORT|g" -e "s|@DBD_PORT@|$DBD_PORT|g" \
        -e "s|@NODES@|$(node_range)|g" -e "s|@NODE_PORTS@|$NODE_PORTS|g" -e "s|@MEMORY_MB@|$(memory_mb)|g" \
        -e "s|@PLUGINS@|$SLURM_HOME/usr/lib/x86_64-linux-gnu/slurm-wlm|g" "$REPO/tests/cluster/slurm.conf.in"
}

# node_range: the nodes as slurm.conf names them, n[1-2].
node_range() { echo "${SLURM_NODES[0]%?}[1-${#SLURM_NODES[@]}]"; }

# GPUs in name only, so that --gpus-per-node can be scheduled here: plain files stand for the devices.
write_gres_conf() {
    install -d "$STATE/gpu" && touch "$STATE"/gpu/{0,1}
    echo "Name=gpu File=$STATE/gpu/[0-1]" >"$ETC/gres.conf"
}

# A job of scrontab, or of --export=NONE, starts with the environment of a login, and the user logs in to the
# first cluster: there, `sbatch` would be the system's, which this cluster's slurmctld does not talk to.
write_task_prolog() {
    install -m 755 /dev/stdin "$ETC/task_prolog" <<END
#!/bin/sh
case \$PATH in $SLURM_PATH*) ;; *) echo "export PATH=$SLURM_PATH\$PATH" ;; esac
END
}

memory_mb() { awk '$1 == "MemTotal:" { print int($2 / 1024 / 1000) * 1000 }' /proc/meminfo; }

write_slurmdbd_conf() {
    install -d -o mysql -g mysql "$STATE/mariadb"
    install -d -o slurm -g slurm "$STATE/slurm/dbd"
    [ -s "$ETC/slurmdbd.conf" ] && return
    local password
    password=$(head -c 18 /dev/urandom | base64 | tr '+/' 'ab')
    install -o slurm -g slurm -m 600 /dev/stdin "$ETC/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=$MUNGE_SOCKET
DbdHost=localhost
DbdPort=$DBD_PORT
SlurmUser=slurm
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DB_PORT
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_acct
LogFile=$LOGS/slurmdbd.log
PidFile=$STATE/run/slurmdbd.pid
END
}

start_services() {
    started=()
    start_munged
    ! has_accounting || start_accounting
    start_slurmctld
    start_nodes
    if [ ${#started[@]} = 0 ]; then say "every service was already running"; else say "started ${started[*]}"; fi
}

start_munged() {
    pid_of munged >/dev/null && return
    [ -s "$STATE/munge/munge.key" ] ||
        head -c 1024 /dev/urandom | install -o munge -g munge -m 400 /dev/stdin "$STATE/munge/munge.key"
    rm -f "$MUNGE_SOCKET"*
    runuser -u munge -- munged --key-file="$STATE/munge/munge.key" --socket="$MUNGE_SOCKET" \
        --pid-file="$STATE/munge/munged.pid" --log-file="$STATE/munge/munged.log" --seed-file="$STATE/munge/munged.seed"
    cp "$STATE/munge/munged.pid" "$STATE/run/munged.pid"
    started+=(munged)
}

start_accounting() {
    start_mariadb
    start_slurmdbd
}

start_mariadb() {
    pid_of mariadbd >/dev/null && return
    [ -d "$STATE/mariadb/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$STATE/mariadb" \
        --auth-root-authentication-method=socket >"$LOGS/mariadb-install.log" 2>&1
    install -o mysql -g mysql -m 644 /dev/null "$LOGS/mariadb.log"
    setsid mariadbd --no-defaults --user=mysql --datadir="$STATE/mariadb" --socket="$DB_SOCKET" \
        --bind-address=127.0.0.1 --port=$DB_PORT --skip-name-resolve --innodb-lock-wait-timeout=900 \
        --pid-file="$STATE/run/mariadbd.pid" --log-error="$LOGS/mariadb.log" </dev/null >/dev/null 2>&1 &
    wait_for 60 mariadbd mariadb-admin --no-defaults --socket="$DB_SOCKET" ping
    local password
    password=$(sed -n 's/^StoragePass=//p' "$ETC/slurmdbd.conf")
    mariadb --no-defaults --socket="$DB_SOCKET" <<END
CREATE DATABASE IF NOT EXISTS slurm_acct;
CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '$password';
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';
END
    started+=(mariadbd)
}

# daemon NAME COMMAND...: start a Slurm daemon in a clean environment (jobs inherit some of it).
daemon() {
    local name=$1
    shift
    pid_of "$name" >/dev/null && return
    env -i PATH="$SLURM_PATH"/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF="$SLURM_CONF" "$@" >>"$LOGS/$name.out" 2>&1 ||
        die "$name did not start; see $LOGS"
    started+=("$name")
}

start_slurmdbd() {
    daemon slurmdbd slurmdbd
    wait_for 60 slurmdbd sacctmgr -n list cluster
    sacctmgr -n list cluster format=cluster%20 | grep -qw bbu || sacctmgr -iQ add cluster bbu >>"$LOGS/slurmdbd.out"
}

start_slurmctld() {
    daemon slurmctld slurmctld
    wait_for 60 slurmctld sh -c 'scontrol ping | grep -qw UP'
}

start_nodes() {
    local node
    for node in "${SLURM_NODES[@]}"; do daemon "slurmd-$node" slurmd -N "$node" "${SLURMD_OPTIONS[@]}"; done
    wait_for 60 "the nodes" all_nodes_up
    # a session that was killed leaves its jobs to the next slurmctld, which starts them again on nodes that tests need
    case " ${started[*]} " in *" slurmctld "*) cancel_jobs ;; esac
}

cancel_jobs() {
    scancel --user="$BBU_USER" 2>/dev/null || true
    wait_for 30 "the end of all jobs" no_jobs
}

no_jobs() { [ -z "$(squeue -h)" ]; }

# all_nodes_up: nodes that a killed session left down or drained are taken back into service.
all_nodes_up() {
    local bad
    bad=$(sinfo -h -N -o '%N %T' | awk '$2 !~ /^(idle|mixed|allocated|completing)$/ { print $1 }' | sort -u)
    [ -z "$bad" ] && return
    scontrol update NodeName="$(paste -sd, <<<"$bad")" State=RESUME
    return 1
}

stop_slurm() {
    local node
    for node in "${SLURM_NODES[@]}"; do stop "slurmd-$node"; done
    stop slurmctld
    stop slurmdbd
}

stop_services() {
    stop_slurm
    stop mariadbd
    stop munged
}

# stop NAME: ask a daemon to end, and wait until it has.
stop() {
    local pid
    pid=$(pid_of "$1") || return 0
    kill "$pid"
    wait_for 60 "the end of $1" sh -c "! kill -0 $pid"
    rm -f "$STATE/run/$1.pid"
}
