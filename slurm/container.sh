#!/usr/bin/env bash
# Run a command inside the project's image: the one way in, for the sbatch templates and for submitit alike.
#
#   slurm/container.sh COMMAND ARGS...
#
#   BBU_IMAGE   the image (.sif file or unpacked folder); empty: run COMMAND on the host, no container
#   BBU_HOME    the checkout: bound at the same path, and first on Python's path (default: this file's parent)
#   BBU_BINDS   more folders to bind, as Apptainer takes them: /data,/scratch:/tmp/scratch
#   BBU_SHIELD  auto | on | off: see mount_shielded below (auto)
#   BBU_NV      1 makes the GPUs visible inside (0)
#
# Exit code: the command's own (128+n if signal n killed it). Besides: 127, no Apptainer, no image, or no way to
# shield it; 75 (EX_TEMPFAIL), USR1, USR2 or TERM came before the command began: nothing was lost, run it again.
# Signals are not handed on: Slurm sends them to every process of a step; by hand, signal the process group.
set -u

home=${BBU_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
image=${BBU_IMAGE:-}
mounted='' # our own mount of the image, while there is one
asked=''   # the stop signal that came, if one did

fail() { printf 'container.sh: %s\n' "$*" >&2; exit 127; }

check() {
    [ $# -gt 0 ] || fail "no command given; usage: container.sh COMMAND ARGS..."
    case $home$PWD in *[,:]*) fail "Apptainer cannot bind a path with a comma or colon: $home, $PWD" ;; esac
    [ -n "$image" ] || return 0
    [ -e "$image" ] || fail "no image at BBU_IMAGE=$image; build it with containers/build.sh"
    command -v apptainer >/dev/null || fail "apptainer is not on PATH; install or load it, or unset BBU_IMAGE"
    case ${BBU_SHIELD:-auto} in auto | on | off) ;; *) fail "BBU_SHIELD=$BBU_SHIELD; it is auto, on or off" ;; esac
}

run_on_host() {
    export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
    begin exec "$@"
}

# provenance: what the results were made with, for whoever asks later; empty where it is not known.
provenance() {
    export BBU_IMAGE_DIGEST='' BBU_COMMIT
    BBU_COMMIT=$(git -C "$home" rev-parse HEAD 2>/dev/null)
    # left beside the image by containers/build.sh; hashing gigabytes at each start would take longer than it
    [ -z "$image" ] || [ ! -r "$image.sha256" ] || read -r BBU_IMAGE_DIGEST _ <"$image.sha256"
}

# arguments ROOT: the command line that enters the container, into the array `enter`. The environment is kept
# (Slurm's variables are wanted inside); variables set for the inside alone carry Apptainer's own prefix.
arguments() {
    export APPTAINERENV_PYTHONPATH=$home APPTAINERENV_PYTHONNOUSERSITE=1 APPTAINERENV_HF_HUB_OFFLINE=1
    enter=(apptainer --silent exec --bind "$home" --pwd "$PWD")
    [ "$PWD" = / ] || enter+=(--bind "$PWD")
    [ -z "${BBU_BINDS:-}" ] || enter+=(--bind "$BBU_BINDS")
    [ "${BBU_NV:-0}" != 1 ] || enter+=(--nv)
    enter+=("$1")
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
    sweep
    mounted=$(mktemp -d "${TMPDIR:-/tmp}/bbu-image.$UID.XXXXXX") || fail "cannot make a folder in ${TMPDIR:-/tmp}"
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

# sweep: a job killed outright has no time to unmount and leaves a dead mount, on which stat fails.
sweep() {
    local folder
    for folder in "${TMPDIR:-/tmp}/bbu-image.$UID".*; do
        stat "$folder" >/dev/null 2>&1 || unmount "$folder"
    done
}

unmount() {
    local tool
    tool=$(command -v fusermount3 || command -v fusermount) || return
    { "$tool" -u "$1" || "$tool" -u -z "$1"; } 2>/dev/null
    rmdir "$1" 2>/dev/null
}

clean_up() { [ -z "$mounted" ] || unmount "$mounted"; }

# begin COMMAND...: unless a stop signal came already. In the foreground the shell holds its traps back until
# the command has ended, so `$?` is the command's own code whatever came meanwhile.
begin() {
    [ -z "$asked" ] || { echo "container.sh: $asked came before the command began; not started" >&2; exit 75; }
    "$@"
}

main() {
    trap 'asked=USR1' USR1
    trap 'asked=USR2' USR2
    trap 'asked=TERM' TERM
    check "$@"
    provenance
    [ -n "$image" ] || run_on_host "$@"
    if ! shield_needed; then
        arguments "$image"
        begin exec "${enter[@]}" "$@"
    fi
    trap clean_up EXIT
    mount_shielded
    arguments "$mounted"
    begin "${enter[@]}" "$@"
}

main "$@"
