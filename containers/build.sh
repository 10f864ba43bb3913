#!/usr/bin/env bash
# Build an image, or find the one built before from the same sources.
#
#   containers/build.sh cpu|cuda [--out FILE]
#
# Prints the path of the image. Images are kept in $BBU_IMAGE_CACHE (~/.cache/bbu/images) under the hash of
# everything they are built from; FILE.sha256 beside each holds the hash of the image itself. Needs Apptainer,
# an ordinary user with subuids (--fakeroot) and, for cpu, debootstrap. The log is beside the image.
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

# apptainer_build KIND KEY TARGET: the build proper. A fast compressor: gzip would double the build time.
apptainer_build() {
    local kind=$1 args=(--fakeroot --force --mksquashfs-args "-comp zstd -Xcompression-level 1")
    export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$cache/tmp}
    mkdir -p "$APPTAINER_TMPDIR"
    cd "$here"
    case $kind in
        cpu)
            wheels "$cache/wheels"
            apptainer build "${args[@]}" --bind "$cache/wheels:/mnt/wheels:ro" --build-arg MIRROR="$("$here/mirror.sh")" \
                --build-arg KEY="$2" "$3" bbu-cpu.def
            ;;
        cuda)
            apptainer build "${args[@]}" --build-arg KEY="$2" \
                --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$3" bbu.def
            ;;
    esac
}

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

main() {
    local kind=${1:-} out='' image
    case $kind in cpu | cuda) shift ;; *) usage ;; esac
    [ $# = 0 ] || { [ "$1" = --out ] && [ $# = 2 ] || usage; out=$2; }
    command -v apptainer >/dev/null || die "apptainer is not on PATH; install it, or on Debian 12 run tests/cluster/up.sh"
    mkdir -p "$cache"
    image=$cache/bbu-$kind-$(key "$kind").sif
    [ -f "$image.sha256" ] || build "$kind" "$(key "$kind")" "$image"
    if [ -n "$out" ]; then
        cp "$image" "$out.partial" && mv "$out.partial" "$out"
        awk -v name="${out##*/}" '{ print $1 "  " name }' "$image.sha256" >"$out.sha256"
    fi
    echo "${out:-$image}"
}

main "$@"
