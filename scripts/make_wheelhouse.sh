#!/usr/bin/env bash
# Fill a folder with the wheels that scripts/run_gpu_tests.sh needs, for a machine that can't reach a package registry.
#
#   scripts/make_wheelhouse.sh WHEELS_DIR
#
#   PYTHON          an interpreter with pip, on this machine (python3)
#   PYTHON_VERSION  that machine's Python (3.12)
#   ARCH            that machine's processor (x86_64)
#   CORES           versions of megatron-core ("0.16.1 0.19.2")
#
# That machine must have torch, transformers, safetensors and tensorboard.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -eq 1 ] || fail "$# arguments: scripts/make_wheelhouse.sh WHEELS_DIR"
wheels="$1"
python="${PYTHON:-python3}" python_version="${PYTHON_VERSION:-3.12}" arch="${ARCH:-x86_64}"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: choose another PYTHON"
mkdir -p "$wheels" || fail "$wheels can't be made: choose another WHEELS_DIR"

fetch() {
    # Core 0.17 and later declare Python 3.12 and run on 3.11.
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --ignore-requires-python --dest "$wheels" \
        --only-binary :all: --python-version "$python_version" --implementation cp "$@"
}

download() {
    fetch --platform "manylinux_2_28_$arch" --platform "manylinux_2_17_$arch" --platform "manylinux2014_$arch" "$@" ||
        fail "$* is not to be had for Python $python_version on $arch: see above"
}

for core in ${CORES:-0.16.1 0.19.2}; do
    download "megatron-core==$core"
    # For local checkpoints: the version that goes with this Core, whatever the glibc it was built for.
    local_checkpoints="nvidia-resiliency-ext==$([ "$core" = 0.16.1 ] && echo 0.4.1 || echo 0.6.0)"
    fetch --platform "manylinux_2_31_$arch" --platform "manylinux_2_39_$arch" "$local_checkpoints" ||
        echo "no $local_checkpoints for Python $python_version on $arch: tests of local checkpoints will be skipped"
done
download "omegaconf>=2.3,<2.4" pytest pytest-timeout iniconfig packaging pluggy pygments pyyaml psutil tqdm einops
# What omegaconf 2.3 reads its grammar with; it has no wheel.
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$wheels" \
    "antlr4-python3-runtime==4.9.*" || fail "no wheel of antlr4-python3-runtime could be built: see above"
echo "$(find "$wheels" -name "*.whl" | wc -l) wheels for Python $python_version on $arch, $(du -sh "$wheels" | cut -f1): $wheels"
