#!/usr/bin/env bash
# Write the lock files of both images anew, from the packages' metadata alone:
#
#   containers/lock.sh          # needs uv; writes requirements.lock (CUDA) and requirements-cpu.txt (CPU)
#
# Run it after changing pyproject.toml or requirements.in, and commit what it writes. uv does not read pip's
# configuration: where torch's CPU wheel lies in a folder, name that folder in UV_FIND_LINKS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
quiet=(--quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links)
sources=(pyproject.toml --extra train containers/requirements.in)

compile() { # compile PYTHON ARGS...
    local python=$1
    shift
    uv pip compile "${sources[@]}" "${quiet[@]}" --python-version "$python" \
        --python-platform x86_64-manylinux_2_28 "$@"
}

lock_cuda() {
    echo "# Every wheel of base-cuda.def with its hashes. Made by containers/lock.sh; do not edit by hand."
    # what has no wheels stands in requirements-source.txt
    compile 3.12 --generate-hashes --no-emit-package deepspeed --no-emit-package pyvips
}

lock_cpu() {
    local torch
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' containers/requirements.lock)
    echo "# Every Python package of base-cpu.def. Made by containers/lock.sh; do not edit by hand."
    echo "# torch is the CPU build (+cpu): where pip's index has only the CUDA one, add torch's CPU index to pip's."
    compile 3.11 --override <(echo "torch==$torch+cpu")
}

lock_cuda >containers/requirements.lock.new && mv containers/requirements.lock{.new,}
lock_cpu >containers/requirements-cpu.txt.new && mv containers/requirements-cpu.txt{.new,}
