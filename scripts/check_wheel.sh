#!/usr/bin/env bash
# Build a wheel, install it into a new environment, and start what it brings, away from the source.
#
#   scripts/check_wheel.sh PYTHON TORCH_VERSION CORE_VERSION
set -euo pipefail
[ $# -eq 3 ] || { echo "error: scripts/check_wheel.sh PYTHON TORCH_VERSION CORE_VERSION" >&2; exit 2; }
cd "$(dirname "$0")/.."
output="$PWD/build/wheel" python="$1"
rm -rf "$output" build/lib build/bdist.*
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$output" .

"$python" -m venv "$output/venv"
own="$output/venv/bin/python"
"$own" -m pip install --quiet "torch==$2"
"$own" -m pip install --quiet --ignore-requires-python --no-deps "megatron-core==$3"
"$own" -m pip install --quiet "$output"/*.whl

sources="$PWD/src"
cd "$output"
"$own" -W ignore - "$sources" <<'PY'
import importlib
import pkgutil
import sys
from pathlib import Path

import megatron.bridge

sources = Path(sys.argv[1])
installed = Path(megatron.bridge.__file__).parents[2]
assert installed != sources, f"{megatron.bridge.__file__} is the source, not the wheel"
expected = {path.relative_to(sources) for path in (sources / "megatron" / "bridge").rglob("*.py")}
found = {path.relative_to(installed) for path in (installed / "megatron" / "bridge").rglob("*.py")}
assert found == expected, f"not in the wheel: {sorted(map(str, expected - found))}"
assert (installed / "megatron" / "bridge" / "py.typed").is_file(), "type checkers would pass over it"
assert not (installed / "megatron" / "__init__.py").exists(), "megatron would no longer be a namespace"
names = [module.name for file in $(cd "$sources/megatron/bridge" && grep -l '^if __name__ == "__main__"' ./*.py ./*/__main__.py); do
    module="$(dirname "${file#./}")/$(basename "$file" .py)"
    module="${module#./}" module="${module%/__main__}"
    "$own" -m "megatron.bridge.$module" --help >/dev/null
    echo "python -m megatron.bridge.$module starts"
done
ls "$output"/*.whl
