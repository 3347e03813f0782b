# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Makefile finds an interpreter on machines of every kind, says which, and leaves nothing half-made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).parents[2]
FIND = ROOT / "scripts" / "find_python.sh"
TOOLS = ("awk", "bash", "cat", "mkdir", "rm", "sh", "touch", "uname")
"""What the script and the recipe call; nothing else of this machine is on the PATH of these tests."""


@pytest.fixture
def machine(tmp_path):
    """A machine with a copy of the Makefile and an empty list of interpreters."""
    for folder in ("bin", "project/scripts"):
        (tmp_path / folder).mkdir(parents=True)
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copy(ROOT / "Makefile", tmp_path / "project")
    shutil.copy(FIND, tmp_path / "project" / "scripts")
    (tmp_path / "project" / "pyproject.toml").touch()
    return tmp_path


def has(machine, name, full=None, state="complete", folder="bin"):
    """Give a machine an interpreter that answers as one of that version does; without one it ends with an error."""
    minor = (full or "").rpartition(".")[0]
    answer = f"echo {minor} {full} {state}" if full else "echo 'pyenv: command not found' >&2; exit 127"
    path = machine / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) {answer} ;; *pip*) exit 0 ;; *) exit 9 ;; esac\n')
    path.chmod(0o755)
    return path


def find(machine, *arguments, path="bin"):
    job = subprocess.run(
        ["bash", FIND, *arguments],
        cwd=machine / "project",
        env={"PATH": ":".join(str(machine / part) for part in path.split(":"))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.stderr.count("\n") == (0 if "--version" in arguments and not job.returncode else 1), job.stderr
    return job


@pytest.mark.parametrize(
    ("system", "names", "full"),
    [
        ("Debian 12", ["python3", "python3.11"], "3.11.2"),
        ("Debian 13", ["python3", "python3.13"], "3.13.5"),
        ("Ubuntu 22.04", ["python3", "python3.10"], "3.10.12"),
        ("Ubuntu 24.04", ["python3", "python3.12"], "3.12.3"),
        ("one that has no name with a version", ["python3"], "3.12.9"),
        ("one with python alone", ["python"], "3.11.9"),
    ],
)
def test_a_bare_machine_has_one(machine, system, names, full):
    for name in names:
        has(machine, name, full)
    job = find(machine, ".venv")
    assert job.stdout == f"{machine}/bin/{names[-1]}\n", system
    assert job.stderr == f"Python {full} ({machine}/bin/{names[-1]}): the newest usable of 3.10 to 3.13\n"
    assert find(machine, "--version", ".venv").stdout == full.rpartition(".")[0] + "\n"


def test_the_newest_that_works_is_taken_and_what_was_passed_over_is_said(machine):
    has(machine, "python3", "3.14.1")
    has(machine, "python3.13", folder="shims")
    has(machine, "python3.12", "3.12.3", "no-venv")
    has(machine, "python3.11", folder="shims")
    has(machine, "python3.11", "3.11.2")
    has(machine, "python3.10", "3.10.12")
    job = find(machine, ".venv", path="shims:bin")
    assert job.stdout == f"{machine}/bin/python3.11\n"
    assert job.stderr == (
        f"Python 3.11.2 ({machine}/bin/python3.11): the newest usable of 3.10 to 3.13; {machine}/shims/python3.13 does "
        f"not start; {machine}/bin/python3.12 has no venv or ensurepip; {machine}/shims/python3.11 does not start\n"
    )


@pytest.mark.parametrize(
    ("interpreters", "message"),
    [
        ({}, "no usable Python 3.10 to 3.13 (none on the PATH): install one, on Debian or Ubuntu with apt install"),
        ({"python3": ("3.9.2",)}, "no usable Python 3.10 to 3.13 (found: {bin}/python3 is Python 3.9.2): install one"),
        ({"python3.13": ("3.13.1", "another-build")}, "no usable Python 3.10 to 3.13 (found: {bin}/python3.13 is Pyth"),
        ({"python3.12": (None,)}, "no usable Python 3.10 to 3.13 (found: {bin}/python3.12 does not start): install"),
        (
            {"python3": ("3.11.2", "no-venv"), "python3.11": ("3.11.2", "no-venv")},
            "no Python to make an environment with; {bin}/python3.11 has no venv or ensurepip; {bin}/python3 has no "
            "venv or ensurepip: on Debian or Ubuntu: apt install python3.11-venv\n",
        ),
    ],
)
def test_none_is_one_line_and_nothing_is_made(machine, interpreters, message):
    for name, answer in interpreters.items():
        has(machine, name, *answer)
    job = find(machine, ".venv")
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith("error: " + message.format(bin=machine / "bin"))

    made = make(machine, "install")
    assert made.returncode == 2 and job.stderr in made.stderr
    assert not (machine / "project" / ".venv").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("3.12.3",), "Python 3.12.3 ({own}): named in PYTHON\n"),
        ((None,), "error: PYTHON={own} does not start: name an interpreter of Python 3.10 to 3.13\n"),
        (("3.9.2",), "error: PYTHON={own} is Python 3.9.2: 3.10 to 3.13 are supported\n"),
        (("3.13.1", "another-build"), "error: PYTHON={own} is no 64-bit CPython with a GIL: torch and Core have no"),
        (("3.12.3", "no-venv"), "error: PYTHON={own} (Python 3.12.3) has no venv or ensurepip: on Debian or Ubuntu"),
    ],
)
def test_the_one_asked_for_is_checked_too(machine, answer, message):
    has(machine, "python3.13", "3.13.5")
    own = has(machine, "own", *answer, folder="elsewhere")
    job = find(machine, ".venv", str(own))
    assert job.stderr.startswith(message.format(own=own))
    assert (job.returncode, job.stdout) == ((2, "") if "error" in message else (0, f"{own}\n"))


@pytest.mark.parametrize("missing", ["ensurepip", "venv"])
def test_a_real_interpreter_without_a_part_of_the_standard_library_is_passed_over(machine, missing):
    """As Debian's without python3-venv, which has the one and lacks the other."""
    (machine / f"{missing}.py").write_text("raise ImportError")
    own = machine / "own"
    own.write_text(f'#!/bin/sh\nPYTHONPATH={machine} exec {sys.executable} "$@"\n')
    own.chmod(0o755)
    job = find(machine, ".venv", str(own))
    assert (job.returncode, job.stdout) == (2, "")
    assert "has no venv or ensurepip: on Debian or Ubuntu: apt install python3." in job.stderr
    assert find(machine, ".venv", sys.executable).stdout == f"{sys.executable}\n"


def test_an_environment_is_kept_with_its_interpreter(machine):
    has(machine, "python3.13", "3.13.5")
    has(machine, "python", "3.11.7", folder="project/.venv/bin")
    job = find(machine, ".venv")
    assert (job.stdout, job.stderr) == (
        ".venv/bin/python\n",
        "Python 3.11.7: that of the environment .venv\n",
    )
    other = find(machine, ".venv", "python3.13")
    assert other.returncode == 2 and other.stderr.startswith("error: .venv has Python 3.11.7 and PYTHON=python3.13 is")

    has(machine, "python", "3.14.0", folder="project/.venv/bin")
    assert "error: .venv has Python 3.14.0: 3.10 to 3.13 are supported; remove .venv" in find(machine, ".venv").stderr
    has(machine, "python", folder="project/.venv/bin")
    assert "error: .venv/bin/python does not start: remove .venv" in find(machine, ".venv").stderr


def make(machine, *arguments):
    return subprocess.run(
        [shutil.which("make"), *arguments],
        cwd=machine / "project",
        env={"PATH": str(machine / "bin"), "HOME": str(machine)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("full", "arguments", "core", "resiliency"),
    [
        ("3.10.12", [], "0.16.1", "0.4.1"),
        ("3.11.2", [], "0.16.1", "0.4.1"),
        ("3.12.3", [], "0.19.2", "0.6.0"),
        ("3.13.5", [], "0.19.2", "0.6.0"),
        ("3.13.5", ["CORE=0.16.1"], "0.16.1", "0.4.1"),
        ("3.11.2", ["CORE=0.19.2"], "0.19.2", "0.6.0"),
    ],
)
def test_the_core_goes_with_the_python(machine, full, arguments, core, resiliency):
    has(machine, "python3", full)
    planned = make(machine, "--dry-run", "install", *arguments).stdout
    system = os.uname().sysname
    if system != "Linux" and not arguments:
        core, resiliency = "0.16.1", "0.4.1"
    assert f"megatron-core=={core}\n" in planned and f"nvidia-resiliency-ext=={resiliency} " in planned


def test_the_core_of_an_environment_goes_with_its_own_python(machine):
    has(machine, "python3", "3.13.5")
    has(machine, "python", "3.11.7", folder="project/.venv/bin")
    assert "megatron-core==0.16.1\n" in make(machine, "--dry-run", "install").stdout


def test_an_interrupted_environment_is_made_anew(machine):
    """The interpreter here makes an environment whose pip fails, as without a network."""
    own = has(machine, "python3", "3.11.2")
    text = own.read_text().replace(
        "*) exit 9", f'"-m venv "*) mkdir -p $3/bin && cat {machine}/inner >$3/bin/python ;; *) exit 9'
    )
    own.write_text(text)
    (machine / "inner").write_text("")
    first = make(machine, "install")
    venv = machine / "project" / ".venv"
    assert first.returncode == 2 and (venv / ".unfinished").exists() and not list(venv.glob(".installed*"))
    (venv / "half").touch()

    again = make(machine, "install")
    assert again.returncode == 2 and "Python 3.11.2" in again.stderr
    assert (venv / "bin").exists() and not (venv / "half").exists(), "what was half-made is still there"


def test_what_needs_no_python_runs_without_one(machine):
    assert make(machine, "clean").returncode == 0
