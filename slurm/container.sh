#!/usr/bin/env bash
# Run a command inside the project's image: the one way in, for the sbatch templates and for submitit alike.
#
#   slurm/container.sh COMMAND ARGS...
#
#   BBU_IMAGE         the image (.sif file or unpacked folder); empty: run COMMAND on the host, no container
#   BBU_IMAGE_SHA256  the SHA-256 the image file must have, in hex; empty: take any
#   BBU_HOME          the checkout: bound at the same path (default: this file's parent)
#   BBU_CODE          checkout: BBU_HOME comes first on Python's path; image: it does not, and the copy of the code
#                     that the image carries in /opt/bbu/src runs (checkout)
#   BBU_BINDS         more folders to bind, as Apptainer takes them: /data,/scratch:/tmp/scratch
#   BBU_SCRATCH       a folder on the node's own disk: COMMAND gets a TMPDIR of its own there, removed at the end
#   BBU_SHIELD        auto | on | off: see mount_shielded below (auto)
#   BBU_NV            1 makes the GPUs visible inside (0)
#   BBU_REQUEUE_CAP   a file of slurm/task.sh that COMMAND may write to: bound at the same path
#   TMPDIR            where images are mounted (without BBU_SCRATCH) and where it is noted which are verified (/tmp)
#
# COMMAND finds in BBU_IMAGE_DIGEST and BBU_COMMIT what it runs in and on; see provenance below.
#
# Exit code: the command's own (128+n if signal n killed it). Besides: 127, refused: no Apptainer, no image or not
# the one that is wanted, no way to shield it, a setting that cannot be; 75 (EX_TEMPFAIL), USR1, USR2 or TERM came
# before the command began: nothing was lost, run it again.
# Signals are not handed on: Slurm sends them to every process of a step; by hand, signal the process group.
set -u

home=${BBU_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
image=${BBU_IMAGE:-}
pin=${BBU_IMAGE_SHA256:-}
pin=${pin,,}
code=${BBU_CODE:-checkout}
place=${TMPDIR:-/tmp} # of our own mounts
mounted=''            # our own mount of the image, while there is one
scratch=''            # the command's TMPDIR, if it is ours
child=''              # what `patiently` is waiting for
asked=''              # the stop signal that came, if one did

# fail: the signal that ended a program of ours, and is the real reason, may still be on its way to us.
fail() { sleep 0.1; leave_if_asked; printf 'container.sh: %s\n' "$*" >&2; exit 127; }

leave_if_asked() {
    [ -z "$asked" ] || { echo "container.sh: $asked came before the command began; not started" >&2; exit 75; }
}

check() {
    [ $# -gt 0 ] || fail "no command given; usage: container.sh COMMAND ARGS..."
    case ${image:+$home$PWD${BBU_SCRATCH:-}${BBU_REQUEUE_CAP:-}} in
        *[,:]*) fail "Apptainer cannot bind a path with a comma or colon: $home, $PWD, ${BBU_SCRATCH:-}" \
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
    place=$(cd "$BBU_SCRATCH" 2>/dev/null && pwd -P) && [ -w "$place" ] ||
        fail "BBU_SCRATCH=$BBU_SCRATCH is no folder you can write to on $HOSTNAME; make it one, or leave it empty"
}

# verify: is the image the one that is pinned? Hashing gigabytes takes longer than starting, so a node notes what it
# has hashed, each file as it was then. Its ranks take turns: the first hashes, the others read what it noted.
verify() {
    local notes=${TMPDIR:-/tmp}/bbu-verified.$UID note found
    mkdir -m 700 "$notes" 2>/dev/null
    [ ! -L "$notes" ] && [ -d "$notes" ] && [ -O "$notes" ] && [ "$(stat -c %a "$notes")" = 700 ] ||
        fail "$notes must be a folder of your own with mode 700, to be trusted; remove it or set TMPDIR"
    exec 9>"$notes/lock"
    patiently flock 9 || fail "cannot lock $notes/lock; is it on a local disk? set TMPDIR to one"
    note=$(identity) || fail "cannot look at $image"
    note=$notes/$note
    [ -s "$note" ] || measure "$note"
    read -r found _ <"$note"
    exec 9>&-
    [ "$found" = "$pin" ] || fail "$image has SHA-256 $found, but the pin (BBU_IMAGE_SHA256, image_sha256 in a" \
        "profile) is $pin; take the image that was pinned, or pin this one"
}

# identity: the image file as it is now, as one name. Any write to a file changes its times, replacing it its inode.
identity() {
    local path
    path=$(readlink -f "$image" | cksum) && stat -L -c "${path%% *}-%d-%i-%s-%.9Y-%.9Z" "$image"
}

# measure NOTE: write the image's hash into NOTE, whose name is the image's identity.
measure() {
    patiently sha256sum <"$image" >"$1.new" || fail "cannot read $image"
    [ "$1" = "${1%/*}/$(identity)" ] || fail "$image changed while it was read; run this again when it is whole"
    mv "$1.new" "$1"
}

# patiently COMMAND...: run it deaf to the stop signals, which Slurm sends to every process of a step. If one
# comes, we hear it at once, and the command is ended: there may not be time to wait for it.
patiently() {
    local status
    (trap '' USR1 USR2 TERM && exec "$@") <&0 &
    child=$!
    [ -z "$asked" ] || end_child
    wait "$child"
    status=$?
    child=''
    case $status in 138 | 140 | 143) asked=${asked:-$(kill -l "$status")} ;; esac # it came before the trap was set
    leave_if_asked
    return "$status"
}

# end_child: by the signal whose victims the shell does not report.
end_child() { [ -z "$child" ] || kill -PIPE "$child" 2>/dev/null; }

# provenance: what the results are made with, for whoever asks later; empty where it is not known.
provenance() {
    export BBU_IMAGE_DIGEST=$pin BBU_COMMIT=''
    # left beside the image by containers/build.sh; believed, since nobody asked for it to be verified
    [ -n "$pin" ] || [ -z "$image" ] || [ ! -r "$image.sha256" ] || read -r BBU_IMAGE_DIGEST _ <"$image.sha256"
    # of the image's own code, it is read inside
    [ "$code" = image ] || BBU_COMMIT=$(git -C "$home" rev-parse HEAD 2>/dev/null)
}

# make_scratch: a TMPDIR for this command alone.
make_scratch() {
    scratch=$(own_folder bbu-scratch) || fail "cannot make a folder in $place"
    export APPTAINERENV_TMPDIR=$scratch
}

run_on_host() {
    [ -z "$scratch" ] || export TMPDIR=$scratch
    export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
    run "$@"
}

# Runs before the command: only inside is it seen whether the image, with what is bound over it, holds the code.
# shellcheck disable=SC2016 # it is expanded there
from_image='if [ ! -e /opt/bbu/src/bbu/__init__.py ]; then
    echo "container.sh: BBU_CODE=image, but the image holds no code in /opt/bbu/src; use BBU_CODE=checkout" >&2
    exit 127
fi
BBU_COMMIT=$(cat /opt/bbu/src/REVISION 2>/dev/null)
export BBU_COMMIT
exec "$@"'

# arguments ROOT: the command line that enters the container, into the array `enter`. The environment is kept
# (Slurm's variables are wanted inside); variables set for the inside alone carry Apptainer's own prefix.
arguments() {
    export APPTAINERENV_PYTHONPATH=$home APPTAINERENV_PYTHONNOUSERSITE=1 APPTAINERENV_HF_HUB_OFFLINE=1
    enter=(apptainer --silent exec --bind "$home" --pwd "$PWD")
    [ "$PWD" = / ] || enter+=(--bind "$PWD")
    [ -z "${BBU_BINDS:-}" ] || enter+=(--bind "$BBU_BINDS")
    [ -z "$scratch" ] || enter+=(--bind "$scratch")
    [ -z "${BBU_REQUEUE_CAP:-}" ] || enter+=(--bind "$BBU_REQUEUE_CAP")
    [ "${BBU_NV:-0}" != 1 ] || enter+=(--nv)
    enter+=("$1")
    [ "$code" = image ] || return
    # safe path: `python -m` would put the working folder first, which often is a checkout
    export APPTAINERENV_PYTHONPATH=/opt/bbu/src APPTAINERENV_PYTHONSAFEPATH=1
    enter+=(sh -c "$from_image" container.sh)
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
    local facts libexec configuration
    facts=$(apptainer buildcfg 2>/dev/null) || return 1
    libexec=$(sed -n 's/^LIBEXECDIR=//p' <<<"$facts")
    configuration=$(sed -n 's/^APPTAINER_CONF_FILE=//p' <<<"$facts")
    grep -qx 'APPTAINER_SUID_INSTALL=1' <<<"$facts" && [ -u "$libexec/apptainer/bin/starter-suid" ] &&
        ! grep -Eq '^allow (setuid|setuid-mount squashfs) *= *(no|iflimited)' "$configuration"
}

# fuse_server: the program that serves a squashfs, from PATH or from Apptainer's own folder.
fuse_server() {
    command -v squashfuse_ll && return
    local own
    own=$(apptainer buildcfg LIBEXECDIR)/apptainer/bin/squashfuse_ll
    [ -x "$own" ] && echo "$own"
}

# mount_shielded: serve the image by a process that ignores the signals, each rank its own.
mount_shielded() {
    local offset binary server
    binary=$(fuse_server) || fail "BBU_SHIELD=on needs squashfuse_ll (Debian: squashfuse); install it"
    offset=$(apptainer sif list "$image" | sed -n 's/.*|\([0-9]*\)-[0-9]* *|FS (Squashfs.*/\1/p' | head -n 1)
    [ -n "$offset" ] || fail "$image holds no squashfs; is it an image that containers/build.sh made?"
    mounted=$(own_folder bbu-image) || fail "cannot make a folder in $place"
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

# own_folder NAME: make one whose name says whose it is: NAME.user.where.process.its start time.random
own_folder() { mktemp -d "$place/$1.$UID.$(where).$$.$(started $$).XXXXXX"; }

# where: the node since it booted, and its namespace of processes; a process id means something only within both.
where() {
    local boot namespace
    read -r boot </proc/sys/kernel/random/boot_id
    namespace=$(readlink "/proc/$$/ns/pid")
    echo "${boot%%-*}-${namespace//[^0-9]/}"
}

# started PID: when the process started, in ticks since boot; nothing if it has ended. Ids are used again, this is not.
started() {
    local facts
    { read -r facts <"/proc/$1/stat"; } 2>/dev/null || return
    read -ra facts <<<"${facts##*) }" # field 3 of proc(5) is the first now
    case ${facts[0]} in Z | X) ;; *) echo "${facts[19]}" ;; esac
}

# orphaned FOLDER: did the container.sh that made it end without removing it, killed outright?
orphaned() {
    local made process start
    IFS=. read -r _ _ made process start _ <<<"${1##*/}"
    [ "$made" = "$here" ] && [ "$(started "$process")" != "$start" ]
}

# sweep: a job killed outright has no time to clean up. It leaves a mount that is dead (on which stat fails) or, where
# its processes are not all found and killed, alive; and its scratch. Nothing is killed here: a server ends by
# itself with the last use of its mount, and a program that has outlived its container.sh keeps the image.
sweep() {
    local at folder here
    here=$(where)
    shopt -s nullglob
    for at in "${TMPDIR:-/tmp}" "$place"; do
        for folder in "$at/bbu-image.$UID".*; do
            [ ! -L "$folder" ] || continue # planted: it would unmount something else of ours
            if orphaned "$folder" || ! stat "$folder" >/dev/null 2>&1; then unmount "$folder"; fi
        done
        for folder in "$at/bbu-scratch.$UID".*; do
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

# run COMMAND...: unless a stop signal came already; as our child where there is something to clean up after it. In
# the foreground the shell holds its traps back until the command has ended, so `$?` is the command's own code.
run() {
    leave_if_asked
    [ -n "$mounted$scratch" ] || exec "$@"
    "$@"
}

main() {
    trap 'asked=USR1; end_child' USR1
    trap 'asked=USR2; end_child' USR2
    trap 'asked=TERM; end_child' TERM
    trap clean_up EXIT
    check "$@"
    [ -z "$pin" ] || verify
    provenance
    [ -z "$image${BBU_SCRATCH:-}" ] || sweep
    [ -z "${BBU_SCRATCH:-}" ] || make_scratch
    if [ -z "$image" ]; then
        run_on_host "$@"
    elif shield_needed; then
        mount_shielded
        arguments "$mounted"
        run "${enter[@]}" "$@"
    else
        arguments "$image"
        run "${enter[@]}" "$@"
    fi
}

main "$@"
