# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The scripts for a GPU machine without a package registry: their one-line errors, and that nothing run is no pass."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).resolve().parents[2]
WHEELHOUSE, GPU_TESTS = ROOT / "scripts" / "make_wheelhouse.sh", ROOT / "scripts" / "run_gpu_tests.sh"
CORE = "0.16.1"

TINY_TESTS = """
from pytest import mark

@mark.gpu
@mark.skipif(True, reason="no device in this test")
def test_skips(): pass

@mark.gpu
def test_passes(): pass

@mark.gpu
def test_fails(): assert False

def test_of_another_kind(): assert False
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of wheels with a stand-in for Megatron-Core, and tests."""
    folder = tmp_path_factory.mktemp("gpu_scripts")
    info = f"megatron_core-{CORE}.dist-info"
    content = {
        "megatron/core/__init__.py": "",
        "megatron/core/package_info.py": f"__version__ = {CORE!r}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {CORE}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"megatron_core-{CORE}-py3-none-any.whl", "w") as wheel:
        for name, text in content.items():
            wheel.writestr(name, text)
    (folder / "test_tiny.py").write_text(TINY_TESTS)
    return folder


def run(script, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1", **variables}
    command = [script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd="/")


@pytest.mark.parametrize("script", [WHEELHOUSE, GPU_TESTS])
def test_it_is_a_bash_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        (WHEELHOUSE, [], {}, "0 arguments: scripts/make_wheelhouse.sh WHEELS_DIR"),
        (WHEELHOUSE, ["{folder}/new"], {"PYTHON": "/bin/false"}, "/bin/false has no pip: choose another PYTHON"),
        (GPU_TESTS, [], {}, "no WHEELS_DIR: scripts/run_gpu_tests.sh WHEELS_DIR"),
        (GPU_TESTS, ["{folder}/none"], {}, "{folder}/none is no folder: make it with scripts/make_wheelhouse.sh"),
        (GPU_TESTS, ["{folder}/wheels"], {"PYTHON": "/bin/false"}, "/bin/false has no torch: name one that has in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, script, arguments, variables, message):
    job = run(script, *(argument.format(folder=folder) for argument in arguments), **variables)
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith(f"error: {message.format(folder=folder)}") and job.stderr.count("\n") == 1


def test_skipped_everywhere_is_no_pass_and_a_failure_keeps_pytests_status(folder):
    def gpu_tests(*arguments):
        return run(GPU_TESTS, folder / "wheels", *arguments, VENV=str(folder / "venv"))

    skipped = gpu_tests(CORE, folder / "test_tiny.py", "-k", "skips")
    assert skipped.returncode == 5, skipped.stdout + skipped.stderr
    assert skipped.stderr == (
        "error: nothing ran: all 1 gpu tests were skipped; there is no CUDA device on this machine\n"
    )
    assert f"megatron-core {CORE} ({folder}/venv/" in skipped.stdout
    assert "devices: no CUDA device" in skipped.stdout and "1 skipped, 3 deselected" in skipped.stdout

    passed = gpu_tests(CORE, folder / "test_tiny.py", "-k", "passes")
    assert passed.returncode == 5
    assert passed.stderr.startswith("error: 1 tests passed, none of them on a GPU")

    assert gpu_tests(CORE, folder / "test_tiny.py").returncode == 1

    another = gpu_tests("0.1.2")
    assert another.returncode == 2
    assert another.stderr.startswith(f"error: no wheel megatron_core-0.1.2-*.whl in {folder}/wheels")
