# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The batch job, under a stand-in `sbatch` that runs it here and a stand-in `srun` that checks what it is asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm_scripts" / "run_checkpointing_sync_test.slurm"

SBATCH = f"""#!{sys.executable}
# Like Slurm's with --wait: options from #SBATCH lines and the command line, a copy of the script in a spool folder, the
# output in a file, the job's status.
import os, re, subprocess, sys, tempfile
from pathlib import Path

*options, script = sys.argv[1:]
text = Path(script).read_text()
head = text.split("set -euo")[0]
options = re.findall(r"^#SBATCH (--[a-z-]+=\\S+)$", head, flags=re.MULTILINE) + options
options = dict(option.removeprefix("--").partition("=")[::2] for option in options)
assert text.count("\\n#SBATCH") == head.count("\\n#SBATCH --"), "Slurm reads no options below the first command"
spool = Path(tempfile.mkdtemp(dir=os.environ["SPOOL"])) / "slurm_script"
spool.write_text(text)
output = options["output"].replace("%x", options["job-name"]).replace("%j", "42")
job = {{
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NAME": options["job-name"],
    "SLURM_JOB_NODELIST": "node-7",
    "SLURM_NNODES": options["nodes"],
    "SLURM_NTASKS": options["ntasks"],
    "SLURM_GPUS": options.get("gpus", "0"),
    "SLURM_SUBMIT_DIR": os.getcwd(),
}}
print("Submitted batch job 42")
with open(output, "w") as file:
    sys.exit(subprocess.run(["bash", spool], env=os.environ | job, stdout=file, stderr=subprocess.STDOUT).returncode)
"""

SRUN = f"""#!{sys.executable}
# Like pyxis: the folders that are mounted, the folder to start in; then the command, on this machine.
import os, sys

assert os.environ["SLURM_NNODES"] == os.environ["SLURM_NTASKS"] == "1", "one node and one task"
options, command = {{}}, sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0).partition("=")
    options[name] = value
if not os.path.isfile(options["--container-image"]):
    sys.exit("srun: error: pyxis: no image " + options["--container-image"])
mounts = dict(mount.split(":") for mount in options["--container-mounts"].split(","))
workdir = options["--container-workdir"]
assert mounts[workdir] == workdir and set(options) <= {{
    "--container-image", "--container-mounts", "--container-workdir", "--no-container-mount-home"
}}, options
os.chdir(workdir)
print("container of", options["--container-image"], "with", sorted(mounts), flush=True)
os.execvp(command[0], command)
"""

TINY_TEST = """
import os

def test_sync_passes():
    import megatron.bridge

    assert "slurm_scripts" in os.listdir(), "it starts in the repository"

def test_sync_fails():
    assert False
"""


@pytest.fixture
def submit(tmp_path):
    """Submit the script and wait; gives the job's status and output (what sbatch says, where there is no job)."""
    inert_objects = tmp_path / "bin"
    inert_objects.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (inert_objects / name).write_text(text)
        (inert_objects / name).chmod(0o755)
    (tmp_path / "image.sqsh").touch()
    (tmp_path / "test_tiny.py").write_text(TINY_TEST)

    def run(*options, folder=ROOT, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
        environment = {
            **kept,
            "PATH": f"{inert_objects}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SPOOL": str(tmp_path),
            "TESTS": str(tmp_path / "test_tiny.py"),
            "IMAGE": str(tmp_path / "image.sqsh"),
            **variables,
        }
        environment = {name: value for name, value in environment.items() if value is not None}
        command = ["sbatch", f"--output={tmp_path}/%x-%j.out", "--account=a", "--partition=p", *options, str(SCRIPT)]
        job = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
        assert job.stdout == "Submitted batch job 42\n" and job.stderr == ""
        return job.returncode, (tmp_path / "checkpointing-sync-test-42.out").read_text()

    return run


def test_it_is_a_bash_script():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_the_defaults_are_one_node_one_task_and_leave_the_account_to_the_user():
    defaults = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(), flags=re.MULTILINE))
    assert sorted(defaults) == ["job-name", "nodes", "ntasks", "output", "time"]
    assert (defaults["nodes"], defaults["ntasks"]) == ("1", "1")


def test_a_job_that_passes_says_what_ran_where_and_on_what(submit, tmp_path):
    status, output = submit("--gpus=0", PYTEST_ARGS="-k sync_passes -q")
    assert status == 0, output
    lines = output.splitlines()
    assert lines[0] == f"job 42 on node-7, image {tmp_path}/image.sqsh, repository {ROOT}"
    assert lines[1] == f"container of {tmp_path}/image.sqsh with ['{ROOT}']"
    assert lines[2] == f"node: {os.uname().nodename}"
    for what in ("python 3", "torch ", "megatron-core ", "transformer-engine ", "devices: "):
        assert any(line.startswith(what) for line in lines), what
    assert f"+ {sys.executable} -m pytest {tmp_path}/test_tiny.py -k sync_passes -q" in lines
    assert "1 passed, 1 deselected" in output
    assert lines[-1] == "PASSED: the sync's tests"


def test_a_job_whose_test_fails_fails(submit):
    status, output = submit()
    assert status == 1
    assert "1 failed, 1 passed" in output
    assert output.endswith("FAILED: the sync's tests, status 1\n")


def test_pytests_own_status_is_the_jobs(submit):
    assert submit(PYTEST_ARGS="-k nothing")[0] == 5


def test_more_mounts_may_be_asked_for(submit, tmp_path):
    status, output = submit(PYTEST_ARGS="-k sync_passes", MOUNTS=f"{tmp_path}:/data")
    assert status == 0 and f"with {sorted([str(tmp_path), str(ROOT)])}" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"IMAGE": None}, "error: IMAGE is not set: IMAGE=FILE_OR_NAME sbatch ... run_checkpointing_sync_test.slurm\n"),
        ({"REPO": "/"}, "error: / is not the repository (src/megatron/bridge is missing): call sbatch from it, or set"),
    ],
)
def test_what_is_missing_is_said_in_one_line(submit, variables, message):
    status, output = submit(**variables)
    assert status == 2
    assert output.startswith(message) and output.count("\n") == 1


def test_the_repository_is_the_folder_that_sbatch_is_called_from(submit, tmp_path):
    status, output = submit(folder=tmp_path)
    assert status == 2 and output.startswith(f"error: {tmp_path} is not the repository")
    assert submit(folder=tmp_path, REPO=str(ROOT), PYTEST_ARGS="-k sync_passes")[0] == 0


def test_an_image_that_is_not_there_fails_the_job(submit, tmp_path):
    status, output = submit(IMAGE=f"{tmp_path}/none.sqsh")
    assert status == 1 and "pyxis: no image" in output and "FAILED" in output


def test_an_image_without_pytest_is_named(submit, tmp_path):
    bare = tmp_path / "python-without-packages"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    status, output = submit(PYTHON=str(bare))
    assert status == 1
    assert re.search(
        r"^error: .*pytest: not importable by .*: install it there or choose another PYTHON$", output, re.M
    )


def test_by_default_the_syncs_tests_run_and_then_those_for_a_gpu(submit):
    """Collected only: that the files and the marker are still there is what can go stale."""
    status, output = submit(TESTS=None, PYTEST_ARGS="--collect-only -q")
    assert status == 0, output
    first, second = output.split(" -m pytest ")[1:]
    assert "test_checkpointing.py::test_sync_hybrid_optimizer_param_copies" in first
    assert "test_offloaded_finetune.py::test_offloaded_finetune_equals_the_reference_to_the_bit" in first
    assert "test_offloaded_finetune.py::test_offloaded_finetune_equals_the_reference_on_one_gpu" in second
