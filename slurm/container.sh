#!/usr/bin/env bash
# Runs a command inside the project's image. slurm/task.sh calls it for every task of a job; call it to debug by hand.
#
#   slurm/container.sh COMMAND ARGS...
#
#   BBU_IMAGE         the image (.sif file or unpacked folder); empty: run COMMAND on the host, no container
#   BBU_IMAGE_SHA256  the SHA-256 that the image file must have, in hex; empty: any
#   BBU_HOME          the checkout: bound at the same path (default: the parent of this file's folder)
#   BBU_CODE          checkout: Python imports the code from BBU_HOME; image: from the copy that the image holds in
#                     /opt/bbu/src (checkout)
#   BBU_BINDS         more folders to bind, in Apptainer's form: /data,/scratch:/tmp/scratch
#   BBU_SCRATCH       a folder on the node's own disk: COMMAND gets its own TMPDIR there, removed at the end
#   BBU_SHIELD        auto | on | off: see mount_shielded below (auto)
#   BBU_NV            1 makes the GPUs visible inside (0)
#   BBU_REQUEUE_CAP   a file of slurm/task.sh that COMMAND may write to: bound at the same path
#   TMPDIR            holds the mounts of images (without BBU_SCRATCH) and the notes on verified images (/tmp)
#
# COMMAND finds the image's SHA-256 in BBU_IMAGE_DIGEST and the commit of the code in BBU_COMMIT; see provenance below.
#
# Exit code: the command's own (128+n if signal n killed it). Besides: 127, refused: no Apptainer, no image or another
# one than is pinned, no way to shield it, a setting that is not valid; 75 (EX_TEMPFAIL): USR1, USR2 or TERM came
# before the command began. Nothing is lost then; run it again.
# Signals are not forwarded: Slurm sends them to every process of a step. By hand, signal the process group.
set -u

checkout=${BBU_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
image=${BBU_IMAGE:-}
pin=${BBU_IMAGE_SHA256:-}
pin=${pin,,}
code=${BBU_CODE:-checkout}
mount_root=${TMPDIR:-/tmp} # holds the folders that this script mounts images on
mounted=''                 # this script's mount of the image, while there is one
scratch=''                 # the command's TMPDIR, if this script made one
child=''                   # the program that `run_interruptible` waits for
stop_signal=''             # the stop signal that came, if one did

# fail MESSAGE: refuse to run. A program may have failed because of a stop signal that has yet to reach this shell:
# wait for it, since it is the real reason.
fail() { sleep 0.1; leave_if_stopped; printf 'container.sh: %s\n' "$*" >&2; exit 127; }

leave_if_stopped() {
    [ -z "$stop_signal" ] ||
        { echo "container.sh: $stop_signal came before the command began; not started" >&2; exit 75; }
}

check_settings() {
    [ $# -gt 0 ] || fail "no command given; usage: container.sh COMMAND ARGS..."
    case ${image:+$checkout$PWD${BBU_SCRATCH:-}${BBU_REQUEUE_CAP:-}} in
        *[,:]*) fail "Apptainer cannot bind a path with a comma or colon: $checkout, $PWD, ${BBU_SCRATCH:-}" \
            "${BBU_REQUEUE_CAP:-}" ;;
    esac
    check_scratch
    case $code in checkout | image) ;; *) fail "BBU_CODE=$code; it is checkout or image" ;; esac
    if [ -z "$image" ]; then
        [ "$code" = checkout ] || fail "BBU_CODE=image, but there is no image; set BBU_IMAGE"
        [ -z "$pin" ] || fail "BBU_IMAGE_SHA256 pins an image, but there is none; set BBU_IMAGE"
        return
    fi
    [ -e "$image" ] || fail "no image at BBU_IMAGE=$image; build it with containers/build.sh"
    [ -z "$pin" ] || [[ $pin =~ ^[0-9a-f]{64}$ ]] || fail "BBU_IMAGE_SHA256=$pin; it is 64 hexadecimal digits"
    [ -z "$pin" ] || [ -f "$image" ] || fail "BBU_IMAGE_SHA256 pins a file, but BBU_IMAGE=$image is a folder"
    command -v apptainer >/dev/null || fail "apptainer is not on PATH; install or load it, or unset BBU_IMAGE"
    case ${BBU_SHIELD:-auto} in auto | on | off) ;; *) fail "BBU_SHIELD=$BBU_SHIELD; it is auto, on or off" ;; esac
}

check_scratch() {
    [ -n "${BBU_SCRATCH:-}" ] || return
    mount_root=$(cd "$BBU_SCRATCH" 2>/dev/null && pwd -P) && [ -w "$mount_root" ] ||
        fail "BBU_SCRATCH=$BBU_SCRATCH is no folder you can write to on $HOSTNAME; make it one, or leave it empty"
}

# verify_image: refuse an image that is not the pinned one. Hashing gigabytes takes longer than starting, so a node
# notes the hash of each file under the file's identity. Ranks take turns: the first hashes, the others read its note.
verify_image() {
    local notes=${TMPDIR:-/tmp}/bbu-verified.$UID note digest
    mkdir -m 700 "$notes" 2>/dev/null
    [ ! -L "$notes" ] && [ -d "$notes" ] && [ -O "$notes" ] && [ "$(stat -c %a "$notes")" = 700 ] ||
        fail "$notes must be a folder of your own with mode 700, to be trusted; remove it or set TMPDIR"
    exec 9>"$notes/lock"
    run_interruptible flock 9 || fail "cannot lock $notes/lock; is it on a local disk? set TMPDIR to one"
    note=$(image_identity) || fail "cannot look at $image"
    note=$notes/$note
    [ -s "$note" ] || write_hash "$note"
    read -r digest _ <"$note"
    exec 9>&-
    [ "$digest" = "$pin" ] || fail "$image has SHA-256 $digest, but the pin (BBU_IMAGE_SHA256, image_sha256 in a" \
        "profile) is $pin; take the image that was pinned, or pin this one"
}

# image_identity: a name for the image file in its present state. A write changes the times of a file, and a
# replacement its inode.
image_identity() {
    local path
    path=$(readlink -f "$image" | cksum) && stat -L -c "${path%% *}-%d-%i-%s-%.9Y-%.9Z" "$image"
}

# write_hash NOTE: write the image's hash into NOTE, whose name is the image's identity.
write_hash() {
    run_interruptible sha256sum <"$image" >"$1.new" || fail "cannot read $image"
    [ "$1" = "${1%/*}/$(image_identity)" ] || fail "$image changed while it was read; run this again when it is whole"
    mv "$1.new" "$1"
}

# run_interruptible COMMAND...: run a program that ignores the stop signals, which Slurm sends to every process of a
# step. This shell handles a signal at once and ends the program: there may be no time to wait for it.
run_interruptible() {
    local status
    (trap '' USR1 USR2 TERM && exec "$@") <&0 &
    child=$!
    [ -z "$stop_signal" ] || end_child
    wait "$child"
    status=$?
    child=''
    # 128 + USR1, USR2 or TERM: the signal came before the program ignored it
    case $status in 138 | 140 | 143) stop_signal=${stop_signal:-$(kill -l "$status")} ;; esac
    leave_if_stopped
    return "$status"
}

# end_child: by PIPE, since the shell prints no line about a program that PIPE ended.
end_child() { [ -z "$child" ] || kill -PIPE "$child" 2>/dev/null; }

# set_provenance: what the results are made with; empty where it is not known.
set_provenance() {
    export BBU_IMAGE_DIGEST=$pin BBU_COMMIT=''
    # Without a pin, the hash that containers/build.sh left beside the image is taken unverified.
    [ -n "$pin" ] || [ -z "$image" ] || [ ! -r "$image.sha256" ] || read -r BBU_IMAGE_DIGEST _ <"$image.sha256"
    # the commit of the image's copy of the code is read inside, see code_from_image
    [ "$code" = image ] || BBU_COMMIT=$(git -C "$checkout" rev-parse HEAD 2>/dev/null)
}

# make_scratch: a TMPDIR for this command alone.
make_scratch() {
    scratch=$(make_folder bbu-scratch) || fail "cannot make a folder in $mount_root"
    export APPTAINERENV_TMPDIR=$scratch
}

run_on_host() {
    [ -z "$scratch" ] || export TMPDIR=$scratch
    export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"
    run_command "$@"
}

# Runs in the container before the command: only there can one see whether the image, or a folder bound over its own,
# holds the code.
# shellcheck disable=SC2016 # expanded in the container
code_from_image='if [ ! -e /opt/bbu/src/bbu/__init__.py ]; then
    echo "container.sh: BBU_CODE=image, but the image holds no code in /opt/bbu/src; use BBU_CODE=checkout" >&2
    exit 127
fi
BBU_COMMIT=$(cat /opt/bbu/src/REVISION 2>/dev/null)
export BBU_COMMIT
exec "$@"'

# set_enter ROOT: put the command line that enters the container into the array `enter`. The environment is kept, since
# the command needs Slurm's variables; variables for the inside alone carry Apptainer's prefix APPTAINERENV_.
set_enter() {
    export APPTAINERENV_PYTHONPATH=$checkout APPTAINERENV_PYTHONNOUSERSITE=1 APPTAINERENV_HF_HUB_OFFLINE=1
    enter=(apptainer --silent exec --bind "$checkout" --pwd "$PWD")
    [ "$PWD" = / ] || enter+=(--bind "$PWD")
    [ -z "${BBU_BINDS:-}" ] || enter+=(--bind "$BBU_BINDS")
    [ -z "$scratch" ] || enter+=(--bind "$scratch")
    [ -z "${BBU_REQUEUE_CAP:-}" ] || enter+=(--bind "$BBU_REQUEUE_CAP")
    [ "${BBU_NV:-0}" != 1 ] || enter+=(--nv)
    enter+=("$1")
    [ "$code" = image ] || return
    # Without the safe path `python -m` puts the working folder first on Python's path, and that often is a checkout.
    export APPTAINERENV_PYTHONPATH=/opt/bbu/src APPTAINERENV_PYTHONSAFEPATH=1
    enter+=(sh -c "$code_from_image" container.sh)
}

# shield_needed: Slurm signals every process of a step. A rootless Apptainer serves the image by a process
# of its own (squashfuse_ll), which USR1, USR2 and TERM kill; the image then vanishes under the program, which
# dies of SIGBUS before it could save. A setuid install mounts through the kernel and has no such process.
shield_needed() {
    [ -f "$image" ] || return 1
    case ${BBU_SHIELD:-auto} in on) return 0 ;; off) return 1 ;; esac
    mounts_by_kernel && return 1
    fuse_server >/dev/null && return 0
    echo "container.sh: no squashfuse_ll here: the command may die of a Slurm signal before it can save" >&2
    return 1
}

mounts_by_kernel() {
    local settings libexec configuration
    settings=$(apptainer buildcfg 2>/dev/null) || return 1
    libexec=$(sed -n 's/^LIBEXECDIR=//p' <<<"$settings")
    configuration=$(sed -n 's/^APPTAINER_CONF_FILE=//p' <<<"$settings")
    grep -qx 'APPTAINER_SUID_INSTALL=1' <<<"$settings" && [ -u "$libexec/apptainer/bin/starter-suid" ] &&
        ! grep -Eq '^allow (setuid|setuid-mount squashfs) *= *(no|iflimited)' "$configuration"
}

# fuse_server: the program that serves a squashfs, from PATH or from Apptainer's own folder.
fuse_server() {
    command -v squashfuse_ll && return
    local bundled
    bundled=$(apptainer buildcfg LIBEXECDIR)/apptainer/bin/squashfuse_ll
    [ -x "$bundled" ] && echo "$bundled"
}

# mount_shielded: mount the image through a process that ignores the stop signals; each rank has its own mount.
mount_shielded() {
    local offset binary server
    binary=$(fuse_server) || fail "BBU_SHIELD=on needs squashfuse_ll (Debian: squashfuse); install it"
    offset=$(apptainer sif list "$image" | sed -n 's/.*|\([0-9]*\)-[0-9]* *|FS (Squashfs.*/\1/p' | head -n 1)
    [ -n "$offset" ] || fail "$image holds no squashfs; is it an image that containers/build.sh made?"
    mounted=$(make_folder bbu-image) || fail "cannot make a folder in $mount_root"
    (
        trap '' HUP INT USR1 USR2 TERM
        exec "$binary" -f -o "ro,offset=$offset" "$image" "$mounted"
    ) </dev/null >/dev/null &
    server=$!
    until mountpoint -q "$mounted"; do
        kill -0 "$server" 2>/dev/null || fail "squashfuse_ll could not mount $image; is /dev/fuse open to you?"
        sleep 0.01
    done
}

# make_folder NAME: make a folder whose name identifies its owner: NAME.user.node.process.start time.random
make_folder() { mktemp -d "$mount_root/$1.$UID.$(node_identity).$$.$(start_time $$).XXXXXX"; }

# node_identity: the node since its last boot and its namespace of processes: a process id is unique only within both.
node_identity() {
    local boot namespace
    read -r boot </proc/sys/kernel/random/boot_id
    namespace=$(readlink "/proc/$$/ns/pid")
    echo "${boot%%-*}-${namespace//[^0-9]/}"
}

# start_time PID: when the process started, in ticks since boot; nothing if it has ended. Process ids are used again.
start_time() {
    local fields
    { read -r fields <"/proc/$1/stat"; } 2>/dev/null || return
    read -ra fields <<<"${fields##*) }" # now the first is field 3 of proc(5): the state; field 22 is the start time
    case ${fields[0]} in Z | X) ;; *) echo "${fields[19]}" ;; esac
}

# orphaned FOLDER: whether the container.sh that made the folder was killed outright, without removing it.
orphaned() {
    local node process start
    IFS=. read -r _ _ node process start _ <<<"${1##*/}"
    [ "$node" = "$this_node" ] && [ "$(start_time "$process")" != "$start" ]
}

# remove_leftovers: a job killed outright has no time to clean up. It leaves its scratch, and a mount that is dead (stat
# fails on it) or, where not all of its processes were killed, alive. Nothing is killed here: a server ends by itself
# with the last use of its mount, and a program that has outlived its container.sh keeps the image.
remove_leftovers() {
    local root folder this_node
    this_node=$(node_identity)
    shopt -s nullglob
    for root in "${TMPDIR:-/tmp}" "$mount_root"; do
        for folder in "$root/bbu-image.$UID".*; do
            [ ! -L "$folder" ] || continue # a planted link: unmounting it would unmount something else of this user
            if orphaned "$folder" || ! stat "$folder" >/dev/null 2>&1; then unmount "$folder"; fi
        done
        for folder in "$root/bbu-scratch.$UID".*; do
            if [ -O "$folder" ] && orphaned "$folder" && ! used_as_tmpdir "$folder"; then rm -rf "$folder"; fi
        done
    done
    shopt -u nullglob
}

used_as_tmpdir() { grep -qszxF -- "TMPDIR=$1" /proc/[0-9]*/environ; }

unmount() {
    local tool
    tool=$(command -v fusermount3 || command -v fusermount) || return
    { "$tool" -u "$1" || "$tool" -u -z "$1"; } 2>/dev/null
    rmdir "$1" 2>/dev/null
}

clean_up() {
    end_child
    [ -z "$mounted" ] || unmount "$mounted"
    [ -z "$scratch" ] || rm -rf "$scratch"
}

# run_command COMMAND...: unless a stop signal came already; as a child where there is something to clean up after it.
# The shell runs its traps only after a foreground child has ended, so `$?` is the command's own code.
run_command() {
    leave_if_stopped
    [ -n "$mounted$scratch" ] || exec "$@"
    "$@"
}

main() {
    trap 'stop_signal=USR1; end_child' USR1
    trap 'stop_signal=USR2; end_child' USR2
    trap 'stop_signal=TERM; end_child' TERM
    trap clean_up EXIT
    check_settings "$@"
    [ -z "$pin" ] || verify_image
    set_provenance
    [ -z "$image${BBU_SCRATCH:-}" ] || remove_leftovers
    [ -z "${BBU_SCRATCH:-}" ] || make_scratch
    if [ -z "$image" ]; then
        run_on_host "$@"
    elif shield_needed; then
        mount_shielded
        set_enter "$mounted"
        run_command "${enter[@]}" "$@"
    else
        set_enter "$image"
        run_command "${enter[@]}" "$@"
    fi
}

main "$@"
