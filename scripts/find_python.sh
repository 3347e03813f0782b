#!/usr/bin/env bash
# Find the interpreter to make the environment with: the newest of Python 3.10 to 3.13 that starts and has venv.
#
#   scripts/find_python.sh [--version] VENV [PYTHON]
#
# An existing environment at VENV is kept, with its interpreter. If PYTHON is given, only that one is looked at.
# Prints the interpreter (with --version, "3.12" instead), and on standard error one line that says which it is and why.
# If there is none, it ends with 2 and one line that says what to install. It also runs in bash 3.2, as on a Mac.
set -euo pipefail

only_version=false
if [ "${1:-}" = --version ]; then
    only_version=true
    shift
fi
[ $# -ge 1 ] || { echo "error: no VENV: scripts/find_python.sh [--version] VENV [PYTHON]" >&2; exit 2; }
venv="$1" asked="${2:-}"
versions="3.13 3.12 3.11 3.10" # those that torch and Core have wheels for, the newest first
range="3.10 to 3.13"

fail() {
    echo "error: $1" >&2
    exit 2
}

# "3.12 3.12.3 complete", or another word for what an environment can't be made with. pyenv leaves commands on the PATH
# that only say that they are not there, so each is started.
probe() {
    "$1" -c 'import sys, sysconfig
try:
    import ensurepip, venv
    state = "complete"
except ImportError:
    state = "no-venv"
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED") or sys.maxsize < 2**32:
    state = "another-build"
print("%d.%d" % sys.version_info[:2], "%d.%d.%d" % sys.version_info[:3], state)' 2>/dev/null </dev/null || true
}

supported() {
    case " $versions " in *" $1 "*) true ;; *) false ;; esac
}

found() { # interpreter, its version, why
    if $only_version; then
        echo "$2"
    else
        echo "$3" >&2
        echo "$1"
    fi
    exit 0
}

venv_package() { # what to install where ensurepip is missing
    echo "on Debian or Ubuntu: apt install python$1-venv"
}

if [ -n "$asked" ]; then
    read -r version full state _ <<<"$(probe "$asked") - - -"
    [ "$version" != - ] || fail "PYTHON=$asked does not start: name an interpreter of Python $range"
    supported "$version" || fail "PYTHON=$asked is Python $full: $range are supported"
    [ "$state" != another-build ] || fail "PYTHON=$asked is no 64-bit CPython with a GIL: torch and Core have no wheels for it"
fi

# One that was interrupted while it was made has the Makefile's mark, and is made again.
if [ -d "$venv" ] && [ ! -e "$venv/.unfinished" ]; then
    read -r own own_full _ <<<"$(probe "$venv/bin/python") - - -"
    [ "$own" != - ] || fail "$venv/bin/python does not start: remove $venv, or choose another VENV"
    supported "$own" || fail "$venv has Python $own_full: $range are supported; remove $venv, or choose another VENV"
    [ -z "$asked" ] || [ "$version" = "$own" ] ||
        fail "$venv has Python $own_full and PYTHON=$asked is $full: remove $venv, or choose another VENV"
    $only_version || "$venv/bin/python" -c "import pip" 2>/dev/null ||
        fail "$venv has no pip: remove it, or choose another VENV"
    found "$venv/bin/python" "$own" "Python $own_full: that of the environment $venv"
fi

if [ -n "$asked" ]; then
    [ "$state" = complete ] || fail "PYTHON=$asked (Python $full) has no venv or ensurepip: $(venv_package "$version")"
    found "$asked" "$version" "Python $full ($asked): named in PYTHON"
fi

passed_over="" others="" without=""
for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
    # All of that name on the PATH: the first may be a shim that doesn't start, with the system's own behind it.
    while read -r candidate; do
        [ -n "$candidate" ] || continue
        read -r version full state _ <<<"$(probe "$candidate") - - -"
        if [ "$version" = - ]; then
            passed_over="$passed_over; $candidate does not start"
        elif ! supported "$version" || [ "$state" = another-build ]; then
            others="$others, $candidate is Python $full$([ "$state" != another-build ] || echo " of another build")"
        elif [ "$state" = no-venv ]; then
            without="${without:-$version}"
            passed_over="$passed_over; $candidate has no venv or ensurepip"
        else
            found "$candidate" "$version" "Python $full ($candidate): the newest usable of $range$passed_over"
        fi
    done <<<"$(type -ap "$name" 2>/dev/null | awk '!seen[$0]++')"
done
[ -z "$without" ] || fail "no Python to make an environment with$passed_over: $(venv_package "$without")"
seen="$others${passed_over//;/,}"
if [ -n "$seen" ]; then seen="found:${seen#,}"; else seen="none on the PATH"; fi
fail "no usable Python $range ($seen): install one, on Debian or Ubuntu with \
apt install python3 python3-venv, or name it in PYTHON"
