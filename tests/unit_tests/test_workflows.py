# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The workflows run what the Makefile has, on the versions that it names, and leave nothing of it out."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
BY_HAND = {"help", "install", "model", "test", "quick", "test-checkpoints", "sync-matrix", "resume-matrix", "format"}
BY_HAND |= {"clean"}
"""Parts of other targets, and those that no machine needs to run."""


def jobs():
    for workflow in WORKFLOWS:
        for name, job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].items():
            yield pytest.param(job, id=f"{workflow.stem}-{name}")


def commands_of(job):
    """What a job runs, once for each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        for line in step.get("run", "").splitlines():
            names = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", line)
            for value in matrix[names[0]] if names else [None]:
                yield line.replace(f"${{{{ matrix.{names[0]} }}}}", value) if names else line


@pytest.mark.parametrize("job", jobs())
def test_a_job_calls_only_targets_that_exist(job):
    assert job["timeout-minutes"] <= 180
    commands = list(commands_of(job))
    assert commands
    for command in commands:
        target = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S+)*", command)
        assert target and target[1] in TARGETS, f"{command!r} is no target of the Makefile"


def test_together_they_run_every_target():
    run = {command.split()[1] for job in jobs() for command in commands_of(job.values[0])}
    assert run == TARGETS - BY_HAND


def test_they_run_both_ends_of_the_range_of_versions():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("unit", "functional-cpu", "functional-gpu"):
        versions = tests[name]["strategy"]["matrix"]["core"]
        assert versions == re.findall(r"^(?:OLD|NEW)EST_CORE := (\S+)$", MAKEFILE, re.MULTILINE)
        assert versions[-1] in re.findall(r"CORE=([\d.]+)", ci)


def test_no_job_is_given_more_than_it_needs():
    for workflow in WORKFLOWS:
        assert yaml.safe_load(workflow.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}


def test_pre_commit_runs_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks:
        tool = hook["entry"].replace(".venv/bin/", "").replace(" --force-exclude", "")
        assert f"$(BIN)/{tool} ." in lint


def test_what_make_installs_is_declared():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    assert {"local", "recipes"} <= set(extras)
    assert set(re.search(r"--editable \"\.\[(.*)\]\"", MAKEFILE)[1].split(",")) <= extras


def test_a_wheel_says_that_it_is_typed():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    files = project.partition("[tool.setuptools.package-data]\n")[2].partition("\n\n")[0]
    assert files == '"megatron.bridge" = ["py.typed"]'
    assert (ROOT / "src" / "megatron" / "bridge" / "py.typed").is_file()


def test_the_scripts_are_bash():
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True, timeout=30)
