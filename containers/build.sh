#!/usr/bin/env bash
# Build an image, or find the one that was built before from the same sources.
#
#   containers/build.sh cpu|cuda [--out FILE] [--sign [FINGERPRINT]]
#
# Prints the path of the image and, on stderr, the line that pins it in a cluster profile.
# An image has two layers. The base holds the software (CUDA, torch, flash-attn, DeepSpeed) and depends on its
# definition and the lock files alone. The image is the base with a copy of the code, so a commit compiles nothing
# anew. Both are kept in $BBU_IMAGE_CACHE (~/.cache/bbu/images), each under the hash of everything it is built from;
# FILE.sha256 beside each holds the hash of the image itself, and the log of its build lies there too.
# An image gets its name when its %test has passed, so an image that is found is not tested again (apptainer test FILE
# tests it). --out makes a copy, which must have the hash that was recorded at the build.
# --sign signs the copy with your Apptainer key (apptainer key newpair): your only one, or the one that you name. A
# signature changes the file and holds the time: sign once, and pass that file on.
# JOBS is the number of compilers that run at once for cuda (4).
# Needs Apptainer, an ordinary user with subuids (--fakeroot) and, for cpu, debootstrap.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${BBU_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bbu/images}

die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '4s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

# base_sources KIND: the files that a base is made of, one path relative to the checkout per line. This script is not
# one of them: a change here must not compile flash-attn again.
base_sources() {
    printf 'containers/%s\n' "base-$1.def" selftest.py
    case $1 in
        cpu) printf 'containers/%s\n' requirements-cpu.txt ;;
        cuda) printf 'containers/%s\n' requirements.lock requirements-source.txt ;;
    esac
}

# image_sources: the files that the layer with the code is made of, in the same form.
image_sources() {
    printf 'containers/%s\n' bbu.def build.sh
    find bbu configs -type f ! -name '*.pyc' | sort
}

# hash_files: one hash of the names and contents of the files listed on stdin, relative to the checkout.
hash_files() { (cd "$here/.." && xargs -d '\n' sha256sum | sha256sum | cut -c1-16); }

# base_key KIND: the hash of the base's sources.
base_key() { base_sources "$1" | hash_files; }

# image_key KIND: the hash of the code's layer and of the base under it.
image_key() { { (cd "$here/.." && image_sources) | hash_files && base_key "$1"; } | sha256sum | cut -c1-16; }

# download_wheels FOLDER: everything in requirements-cpu.txt for the image's Python, by the host's pip and its settings.
download_wheels() {
    local platforms=()
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1 linux; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "${PYTHON:-python3}" -m pip download --no-deps --no-build-isolation --dest "$1" \
        -r "$here/requirements-cpu.txt" --python-version 3.11 --implementation cp \
        --abi cp311 --abi abi3 --abi none "${platforms[@]}"
}

# apptainer_build TARGET DEFINITION ARGS...: one call of Apptainer. A fast compressor: gzip would double the build time.
apptainer_build() {
    local target=$1 definition=$2
    shift 2
    export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$cache/tmp}
    mkdir -p "$APPTAINER_TMPDIR"
    apptainer build --fakeroot --force --mksquashfs-args "-comp zstd -Xcompression-level 1" "$@" "$target" "$definition"
}

# build_base KIND TARGET
build_base() {
    case $1 in
        cpu)
            download_wheels "$cache/wheels" || return
            apptainer_build "$2" base-cpu.def --bind "$cache/wheels:/mnt/wheels:ro" \
                --build-arg MIRROR="$("$here/mirror.sh")" --build-arg KEY="$(base_key cpu)"
            ;;
        cuda) apptainer_build "$2" base-cuda.def --build-arg KEY="$(base_key cuda)" --build-arg JOBS="${JOBS:-4}" ;;
    esac
}

# build_image KIND TARGET: the code on top of its base, which must be in the cache.
build_image() {
    local file=bbu.sif
    [ "$1" = cuda ] || file=bbu-$1.sif
    apptainer_build "$2" bbu.def --build-arg BASE="$(base_file "$1")" --build-arg KIND="$1" --build-arg FILE="$file" \
        --build-arg KEY="$(image_key "$1")" --build-arg REVISION="$(revision)"
}

# revision: the commit of the code that goes into the image; -dirty where the checkout differs from that commit.
revision() { git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown; }

# base_file KIND: where the base lies once it is built.
base_file() { echo "$cache/bbu-base-$1-$(base_key "$1").sif"; }

# ensure IMAGE BUILD KIND: build the image by the function BUILD unless it is in the cache. It has a temporary name
# until it is complete. One builder at a time: the others wait for it.
ensure() {
    local image=$1 partial log=${1%.sif}.log
    [ ! -f "$image.sha256" ] || return 0
    partial=$cache/.partial-${2#build_}-$3.sif
    exec 9>"$cache/.lock-${2#build_}-$3"
    flock 9
    [ ! -f "$image.sha256" ] || return 0
    printf 'build.sh: building %s (some minutes); log: %s\n' "$image" "$log" >&2
    # In a shell of its own: --out FILE is relative to the folder of the caller.
    (cd "$here" && "$2" "$3" "$partial") >"$log" 2>&1 9>&- || die "the build failed: $(tail -n 1 "$log") (log: $log)"
    mv "$partial" "$image"
    (cd "$cache" && sha256sum "${image##*/}") >"$image.sha256.new"
    mv "$image.sha256.new" "$image.sha256"
}

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

# key_index FINGERPRINT: the number by which `apptainer sign` knows the key; of the only key, if none is named.
key_index() {
    local keys
    keys=$(apptainer key list --secret | awk '/^[0-9]+\)/ { n = $1 + 0 } $1 == "Fingerprint:" { print n, $2 }')
    [ -n "$keys" ] || die "you have no key to sign with; make one by: apptainer key newpair"
    if [ -n "$1" ]; then
        awk -v requested="${1^^}" '$2 == requested { print $1; present = 1 } END { exit !present }' <<<"$keys" ||
            die "you have no key $1; those you have: $(cut -d ' ' -f 2 <<<"$keys" | paste -sd ' ')"
    elif [ "$(wc -l <<<"$keys")" = 1 ]; then
        echo "${keys%% *}"
    else
        die "you have several keys; name one with --sign: $(cut -d ' ' -f 2 <<<"$keys" | paste -sd ' ')"
    fi
}

# copy_out IMAGE FILE INDEX: a copy, signed if INDEX is a key's number. It gets its name when it is complete.
copy_out() {
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
    command -v apptainer >/dev/null ||
        die "apptainer is not on PATH; install it, or on Debian 12 run tests/cluster/up.sh"
    [ -z "$sign" ] || index=$(key_index "$signer") # before a build that may take an hour
    mkdir -p "$cache"
    image=$cache/bbu-$kind-$(image_key "$kind").sif
    if [ ! -f "$image.sha256" ]; then
        ensure "$(base_file "$kind")" build_base "$kind"
        ensure "$image" build_image "$kind"
    fi
    [ -z "$out" ] || copy_out "$image" "$out" "$index"
    read -r recorded _ <"${out:-$image}.sha256"
    printf 'build.sh: to pin it, write into the cluster profile: image_sha256: %s\n' "$recorded" >&2
    echo "${out:-$image}"
}

main "$@"
