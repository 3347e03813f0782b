# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Paths with a space, a quote or a $: what a launch starts is found, or the launch is refused before it starts."""

import shlex
import subprocess
import sys

import pytest

pytest.importorskip("nemo_run")

from nemo_run.config import get_nemorun_home, set_nemorun_home

from megatron.bridge.recipes.nemo_run_jobs import dry_run
from megatron.bridge.recipes.nemo_run_tasks import SlurmOptions, local_executor, script_task, slurm_executor

NAMES = ["my project", "it's", "cost$HOME", 'a "b"']
SHOW = "import sys; print(sys.argv[1:])"


@pytest.fixture(params=NAMES)
def script(request, tmp_path):
    path = tmp_path / request.param / "show it.py"
    path.parent.mkdir()
    path.write_text(SHOW)
    return str(path)


@pytest.mark.parametrize("arguments", [[], ["x=1"], ["x=a b", "y='$HOME'"]])
def test_a_script_here_is_found_and_gets_its_arguments(script, arguments, tmp_path):
    task = script_task(script, arguments, executor=local_executor(1, env={}))
    (tmp_path / "training.sh").write_text(task.inline)
    # NeMo-Run quotes each argument, and no shell takes the quotes off
    command = ["bash", str(tmp_path / "training.sh"), *map(shlex.quote, task.args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(arguments), done.stderr


def test_a_plain_path_stays_as_it_is(tmp_path):
    assert script_task(f"{tmp_path}/show.py", ["x=1"], executor=local_executor(1, env={})).inline == ""


def test_a_batch_script_quotes_script_and_workdir(script, tmp_path):
    workdir = str(tmp_path / NAMES[1])
    executor = slurm_executor(SlurmOptions(account="A", workdir=workdir), env={})
    directory, _ = dry_run(script_task(script, ["x=1"], executor=executor), executor, title="show it's")
    assert directory.parent.name == "show_it_s"
    [line] = [line for line in (directory / "training_sbatch.sh").read_text().splitlines() if "torchrun" in line]
    words = shlex.split(line)
    assert script in words and f"--chdir={workdir}" in words and words[-1] == "x=1"


@pytest.fixture
def home(tmp_path):
    """Sets NeMo-Run's home, as its command line does."""
    before = get_nemorun_home()
    yield lambda name: set_nemorun_home(str(tmp_path / name))
    set_nemorun_home(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_home_that_needs_quotes_is_refused(name, tmp_path, home):
    home(name)
    with pytest.raises(ValueError, match="^--home .* has a space, a quote or a "):
        slurm_executor(SlurmOptions(account="A", workdir=str(tmp_path)), env={})
    with pytest.raises(ValueError, match="^--home .* has a space, a quote or a "):
        script_task("show.py", ["x=a b"], executor=local_executor(1, env={}))


def test_a_folder_on_the_cluster_that_needs_quotes_is_refused():
    options = SlurmOptions(account="A", ssh="me@login", remote_directory="/scratch/my runs")
    with pytest.raises(ValueError, match="^--remote-dir /scratch/my runs: "):
        slurm_executor(options, env={})


def test_the_interpreter_is_this_one(script):
    task = script_task(script, [], executor=local_executor(1, env={}))
    assert shlex.quote(sys.executable) in task.inline
