#!/usr/bin/env bash
# Apply the pull request of docs/upstream-pr.md to a checkout of Megatron Bridge: one file, its calls, its tests.
#
#   scripts/make_upstream_pr.sh CHECKOUT           applies what fits; lists what doesn't, and exits with 1
#   scripts/make_upstream_pr.sh CHECKOUT --undo    restores all files
#
# The places are found by the names of functions and calls; none of the other repository's text is here. Needs Python
# 3.10 (PYTHON=...) and nothing else.
set -euo pipefail
exec "${PYTHON:-python3}" -B "$(dirname "$0")/upstream_pr/apply.py" "$@"
