#!/usr/bin/env bash
# Lay the pull request of docs/upstream-pr.md into a checkout of Megatron Bridge: one file, its calls, its tests.
#
#   scripts/make_upstream_pr.sh CHECKOUT           what fits is laid; what doesn't is listed, and the status is 1
#   scripts/make_upstream_pr.sh CHECKOUT --undo    all files have their bytes again
#
# The places are found by the names of functions and calls; none of the other repository's text is here. Needs Python
# 3.10 (PYTHON=...) and nothing else.
set -euo pipefail
exec "${PYTHON:-python3}" -B "$(dirname "$0")/upstream_pr/lay.py" "$@"
