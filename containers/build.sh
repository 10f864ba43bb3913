#!/usr/bin/env bash
# Build an image, or find the one built before from the same sources.
#
#   containers/build.sh cpu|cuda [--out FILE] [--sign [FINGERPRINT]]
#
# Prints the path of the image; on stderr, the line that pins it in a cluster profile. Images are kept in
# $BBU_IMAGE_CACHE (~/.cache/bbu/images) under the hash of everything they are built from; FILE.sha256 beside each
# holds the hash of the image itself. An image has its name once its %test has passed, so one that is found is not
# tested again (apptainer test FILE does); a copy made by --out must have the hash that was recorded then.
# --sign signs the copy with a key of yours (apptainer key newpair), the one there is or the one named. A
# signature changes the file and holds the time: sign once, and hand that file on. JOBS is the number of compilers
# at work at once for cuda (4). Needs Apptainer, an ordinary user with subuids (--fakeroot) and, for cpu,
# debootstrap. The log is beside the image.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${BBU_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bbu/images}

die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '4s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

# sources KIND: the files an image is made of, one path relative to the checkout per line.
sources() {
    case $1 in
        cpu) printf 'containers/%s\n' bbu-cpu.def requirements-cpu.txt selftest.py build.sh ;;
        cuda)
            printf 'containers/%s\n' bbu.def requirements.lock requirements-source.txt selftest.py build.sh
            find bbu configs -type f ! -name '*.pyc' | sort # the CUDA image carries the code
            ;;
    esac
}

# key KIND: the hash of names and contents of all sources.
key() { (cd "$here/.." && sources "$1" | xargs -d '\n' sha256sum | sha256sum | cut -c1-16); }

# wheels FOLDER: everything in requirements-cpu.txt for the image's Python, by the host's pip and its settings.
wheels() {
    local platforms=()
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1 linux; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "${PYTHON:-python3}" -m pip download --no-deps --no-build-isolation --dest "$1" \
        -r "$here/requirements-cpu.txt" --python-version 3.11 --implementation cp \
        --abi cp311 --abi abi3 --abi none "${platforms[@]}"
}

# apptainer_build KIND KEY TARGET: the build proper, in a shell of its own: --out FILE is relative to where we were
# called. A fast compressor: gzip would double the build time.
apptainer_build() (
    local kind=$1 args=(--fakeroot --force --mksquashfs-args "-comp zstd -Xcompression-level 1")
    export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$cache/tmp}
    mkdir -p "$APPTAINER_TMPDIR"
    cd "$here"
    case $kind in
        cpu)
            wheels "$cache/wheels" || exit
            apptainer build "${args[@]}" --bind "$cache/wheels:/mnt/wheels:ro" --build-arg MIRROR="$("$here/mirror.sh")" \
                --build-arg KEY="$2" "$3" bbu-cpu.def
            ;;
        cuda)
            apptainer build "${args[@]}" --build-arg KEY="$2" --build-arg JOBS="${JOBS:-4}" \
                --build-arg REVISION="$(revision)" "$3" bbu.def
            ;;
    esac
)

# revision: the commit of the code that goes into the image; -dirty where the tree holds changes besides.
revision() { git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown; }

# build KIND KEY IMAGE: under a temporary name until it is whole; one builder at a time, the rest wait for it.
build() {
    local kind=$1 image=$3 partial=$cache/.partial-$1.sif
    exec 9>"$cache/.lock-$kind"
    flock 9
    [ -f "$image.sha256" ] && return
    printf 'build.sh: building %s (some minutes); log: %s\n' "$image" "${image%.sif}.log" >&2
    apptainer_build "$kind" "$2" "$partial" >"${image%.sif}.log" 2>&1 9>&- ||
        die "the build failed: $(tail -n 1 "${image%.sif}.log") (log: ${image%.sif}.log)"
    mv "$partial" "$image"
    (cd "$cache" && sha256sum "${image##*/}") >"$image.sha256.new"
    mv "$image.sha256.new" "$image.sha256"
}

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

# key_index FINGERPRINT: the number by which `apptainer sign` knows the key; of the only one, if none is named.
key_index() {
    local keys
    keys=$(apptainer key list --secret | awk '/^[0-9]+\)/ { n = $1 + 0 } $1 == "Fingerprint:" { print n, $2 }')
    [ -n "$keys" ] || die "you have no key to sign with; make one by: apptainer key newpair"
    if [ -n "$1" ]; then
        awk -v wanted="${1^^}" '$2 == wanted { print $1; found = 1 } END { exit !found }' <<<"$keys" ||
            die "you have no key $1; those you have: $(cut -d ' ' -f 2 <<<"$keys" | paste -sd ' ')"
    elif [ "$(wc -l <<<"$keys")" = 1 ]; then
        echo "${keys%% *}"
    else
        die "you have several keys; name one with --sign: $(cut -d ' ' -f 2 <<<"$keys" | paste -sd ' ')"
    fi
}

# hand_out IMAGE FILE INDEX: a copy, signed if INDEX is a key's number. Whole before it has its name, like the image.
hand_out() {
    local recorded
    read -r recorded _ <"$1.sha256"
    rm -f "$2.sha256"
    trap 'rm -f "$out.partial"' EXIT
    cp "$1" "$2.partial"
    [ "$(digest "$2.partial")" = "$recorded" ] || die "$1 is damaged; remove it with its .sha256 and build again"
    if [ -n "$3" ]; then
        apptainer --quiet sign --keyidx "$3" "$2.partial" >&2 || die "could not sign $2; see above"
    fi
    printf '%s  %s\n' "$(digest "$2.partial")" "${2##*/}" >"$2.sha256"
    mv "$2.partial" "$2"
}

main() {
    local kind=${1:-} sign='' signer='' index='' image recorded
    out=''
    case $kind in cpu | cuda) shift ;; *) usage ;; esac
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=${2:-} && [ -n "$out" ] && shift 2 || usage ;;
            --sign)
                sign=yes && shift
                case ${1:-} in '' | -*) ;; *) signer=$1 && shift ;; esac
                ;;
            *) usage ;;
        esac
    done
    [ -z "$sign" ] || [ -n "$out" ] || die "--sign needs --out: the image in the cache keeps the hash of its build"
    command -v apptainer >/dev/null || die "apptainer is not on PATH; install it, or on Debian 12 run tests/cluster/up.sh"
    [ -z "$sign" ] || index=$(key_index "$signer") # before a build that may take an hour
    mkdir -p "$cache"
    image=$cache/bbu-$kind-$(key "$kind").sif
    [ -f "$image.sha256" ] || build "$kind" "$(key "$kind")" "$image"
    [ -z "$out" ] || hand_out "$image" "$out" "$index"
    read -r recorded _ <"${out:-$image}.sha256"
    printf 'build.sh: to pin it, write into the cluster profile: image_sha256: %s\n' "$recorded" >&2
    echo "${out:-$image}"
}

main "$@"
