#!/usr/bin/env bash
# Run the tests marked gpu on a machine that can't reach a package registry, with wheels from scripts/make_wheelhouse.sh.
#
#   scripts/run_gpu_tests.sh WHEELS_DIR [CORE_VERSION] [PYTEST_OPTION_OR_TEST ...]
#
#   PYTHON  the interpreter that has torch, of a virtual environment too (python3)
#   VENV    where to make the virtual environment, which is kept (a temporary folder, which is not)
#
# CORE_VERSION is 0.16.1 unless given. The status is pytest's, and 5 if no test ran: all skipped is not a pass.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -ge 1 ] || fail "no WHEELS_DIR: scripts/run_gpu_tests.sh WHEELS_DIR [CORE_VERSION] [PYTEST_OPTION_OR_TEST ...]"
[ -d "$1" ] || fail "$1 is no folder: make it with scripts/make_wheelhouse.sh on a machine with a package registry"
wheels="$(cd "$1" && pwd)" core=0.16.1
shift
if [[ "${1:-}" =~ ^[0-9]+\.[0-9] ]]; then
    core="$1"
    shift
fi
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
venv="${VENV:-$scratch/venv}"
own="$venv/bin/python"

"$python" -c "import torch" 2>/dev/null || fail "$python has no torch: name one that has in PYTHON"
[ -x "$own" ] || "$python" -m venv --system-site-packages "$venv" || fail "$python can't make $venv: see above"
# A virtual environment made from another doesn't see the other's packages by itself.
"$python" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix: print(sysconfig.get_path("purelib"))' \
    >"$("$own" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/made_from.pth"

install() {
    local files=("$wheels/$1"-*.whl)
    [ -f "${files[0]}" ] ||
        fail "no wheel $1-*.whl in $wheels, and $python has none installed: scripts/make_wheelhouse.sh fetches it"
    [ ${#files[@]} -eq 1 ] || fail "${#files[@]} wheels $1-*.whl in $wheels: keep one"
    "$own" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --ignore-requires-python \
        --force-reinstall "${files[0]}" || fail "${files[0]} can't be installed: see above"
}

install "megatron_core-$core"
# omegaconf 2.3 reads its grammar with antlr4 4.9 and no other.
# shellcheck disable=SC2016
if ! "$own" -c 'from omegaconf import OmegaConf; OmegaConf.create({"a": "${b}", "b": 1}).a' 2>/dev/null; then
    install omegaconf
    install antlr4_python3_runtime
fi
for wheel in pytest pytest_timeout iniconfig packaging pluggy pygments pyyaml psutil tqdm einops; do
    "$own" -c "import ${wheel/pyyaml/yaml}" 2>/dev/null || install "$wheel"
done

# For local checkpoints, where the wheel is there: plain Python in a wheel for one glibc.
resiliency=("$wheels/nvidia_resiliency_ext-$([ "$core" = 0.16.1 ] && echo 0.4.1 || echo 0.6.0)"-*.whl)
if [ -f "${resiliency[0]}" ]; then
    "$own" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --upgrade --only-binary :all: \
        --platform "manylinux_2_31_$(uname -m)" --platform "manylinux_2_39_$(uname -m)" \
        --target "$("$own" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "${resiliency[0]}" ||
        fail "${resiliency[0]} can't be installed: see above"
fi

export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$own" scripts/versions.py pytest pytest_timeout omegaconf transformers safetensors tensorboard yaml psutil tqdm

has_target=false
for argument in "$@"; do
    [ ! -e "${argument%%::*}" ] || has_target=true
done
if ! $has_target; then
    mapfile -t targets < <(grep -rl --include="*.py" "pytest\.mark\.gpu" tests)
    set -- "${targets[@]}" "$@"
fi
status=0
echo "+ python -m pytest -m gpu $*"
"$own" -m pytest -p no:cacheprovider -m gpu --junitxml="$scratch/report.xml" "$@" || status=$?
[ "$status" -eq 0 ] || exit "$status"

"$own" - "$scratch/report.xml" <<'PY' || exit 5
import sys
from xml.etree import ElementTree

import torch

suites = list(ElementTree.parse(sys.argv[1]).getroot().iter("testsuite"))
tests, skipped = (sum(int(suite.get(name)) for suite in suites) for name in ("tests", "skipped"))
why = "see pytest's reasons above" if torch.cuda.is_available() else "there is no CUDA device on this machine"
if tests == skipped:
    sys.exit(f"error: nothing ran: all {tests} gpu tests were skipped; {why}")
if not torch.cuda.is_available():
    sys.exit(f"error: {tests - skipped} tests passed, none of them on a GPU: {why}")
print(f"{tests - skipped} gpu tests passed on {torch.cuda.get_device_name()}, {skipped} skipped")
PY
