# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Every command in the documents: which test or workflow runs it, that its options exist, that make knows its targets.

A new command in a document needs a row in `RUN_BY`; a row that fits no command any more must go.
"""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest

from tests.unit_tests.test_documentation import DOCUMENTS, ROOT, without_fences

pytestmark = pytest.mark.any_core

FINETUNE, RESUME = "functional_tests/test_finetune_smollm2.py", "functional_tests/test_resume_matrix.py"
CONVERT, ADAPTERS = "functional_tests/test_conversion_command.py", "functional_tests/test_lora_export.py"
TEXT_GENERATION = "functional_tests/test_text_generation.py"
RECIPE = "functional_tests/test_run_recipe.py"
PREEMPTION = "functional_tests/test_preemption.py"
HELP = "--help"
"""Takes minutes, and what it measures is printed, not tested: only its start is."""

RUN_BY = {
    r"make( PYTHON=python3.12)? (install|finetune|model|test)": (FINETUNE, "scripts/finetune_smollm2/run.py"),
    r"make finetune-lora": (".github/workflows/nightly.yml", "finetune-lora"),  # no test: each of its stages has one
    r"make test( ARGS=.*| CORE=0.19.2 VENV=.*)?": (".ci/run", "make test"),
    r"make test-newest": (".github/workflows/nightly.yml", "test-newest"),
    r"make lint|make format": (".ci/run", "make lint"),
    r"make docs": (".ci/run", "make docs"),
    r"make test-sync": ("functional_tests/test_sync_matrix.py", "HALVES"),
    r"make test-resume": (RESUME, "resume_matrix.cut"),
    r"make test-streams": ("functional_tests/test_order_of_streams.py", "run_on_ranks(run_cells,"),
    r"make soak( CORE=0.19.2 VENV=.*)?": ("functional_tests/test_crash_safety.py", "soak"),
    r"make fuzz": ("functional_tests/test_fuzz.py", "tests.fuzz"),
    r"make bench( ARGS=.*)?": ("unit_tests/test_benchmarks.py", "bench.main("),
    r"make mutants": ("unit_tests/test_mutants.py", "mutants"),
    r"make (quick|unit|functional|test-checkpoints|test-python|test-gpu|coverage|wheel)": (
        ".github/workflows/tests.yml",
        "make",
    ),
    r"\.venv/bin/pre-commit install": ("unit_tests/test_workflows.py", "pre-commit"),
    r"scripts/make_wheelhouse\.sh wheels": ("unit_tests/test_gpu_scripts.py", "make_wheelhouse.sh"),
    r"scripts/run_gpu_tests\.sh wheels 0\.19\.2": ("unit_tests/test_gpu_scripts.py", "run_gpu_tests.sh"),
    r"scripts/make_upstream_pr\.sh CHECKOUT( --undo)?": ("unit_tests/test_upstream_pr.py", "make_upstream_pr.sh"),
    r"IMAGE=.* sbatch .*\.slurm": ("unit_tests/test_slurm_scripts.py", "run_checkpointing_sync_test.slurm"),
    r"torchrun --nproc-per-node \d my_script\.py": (FINETUNE, "scripts/finetune_smollm2/run.py"),
    r"python -m megatron\.bridge\.generate.*": ("functional_tests/test_generate.py", "megatron.bridge.generate"),
    r"torchrun --nproc-per-node \d --max-restarts \d my_script\.py": (PREEMPTION, "--max-restarts"),
    r"python -m megatron\.bridge\.plot .*": ("unit_tests/training/monitoring/test_metrics.py", "draw("),
    r"python -m megatron\.bridge\.checkpoint .*": ("functional_tests/test_bad_input.py", "inspect_checkpoint("),
    r"python -m megatron\.bridge\.convert (import|export|roundtrip)\b(?!-).*": (CONVERT, "megatron.bridge.convert"),
    r"python -m megatron\.bridge\.convert (export-adapter|merge) .*": (ADAPTERS, "export-adapter"),
    r"(python|torchrun --nproc-per-node 8) scripts/training/run_recipe\.py .*": (RECIPE, "run_recipe.py"),
    r"(python|torchrun --nproc-per-node 2) scripts/inference/generate_text\.py .*": (
        TEXT_GENERATION,
        "generate_text.py",
    ),
    r"python -m megatron\.bridge\.memory .*": ("unit_tests/recipes/test_recipes.py", "megatron.bridge.memory"),
    r"pip install \"megatron-bridge\[local\]\"": ("unit_tests/test_workflows.py", "local"),
    r"python scripts/training/launch_with_nemo_run\.py .*": (
        "unit_tests/recipes/test_launching_docs.py",
        "launch_with_nemo_run",
    ),
    r"pip install 'megatron-bridge\[recipes\]'": ("unit_tests/test_workflows.py", "recipes"),
    r"python -m benchmarks\.\w+( --.*)?": (HELP, ""),
}
"""Commands, and the test or workflow that runs such a command, with a text that shows it."""

STARTS = r"(?:[A-Z_]+=\S+ )*(?:make|python|torchrun|pip|sbatch|\.venv/bin/\S+|scripts/\S+)(?= )"


@cache
def commands() -> tuple[tuple[str, str], ...]:
    """(document, command) of every command in a fenced block or between backticks; continued lines are joined."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", without_fences(text))
        for line in lines:
            command = " ".join(line.split(" #")[0].split())
            if re.match(STARTS, command):
                found.append((document.relative_to(ROOT).as_posix(), command))
    return tuple(sorted(set(found)))


@pytest.mark.parametrize("command", sorted({command for _, command in commands()}))
def test_a_test_runs_it(command, monkeypatch):
    rows = [row for pattern, row in RUN_BY.items() if re.fullmatch(pattern, command)]
    assert rows, f"no test runs `{command}`: write one, and a row in RUN_BY"
    file, text = rows[0]
    if file == HELP:
        monkeypatch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(command.split()[2], run_name="__main__")
    else:
        path = ROOT / file if file.startswith(".") else ROOT / "tests" / file
        assert text in path.read_text(encoding="utf-8"), f"{file} doesn't say {text!r}: does it still run `{command}`?"


def test_each_row_fits_a_command():
    known = {command for _, command in commands()}
    unused = [pattern for pattern in RUN_BY if not any(re.fullmatch(pattern, command) for command in known)]
    assert unused == []


@pytest.mark.parametrize(
    "command", sorted({c for _, c in commands() if re.match(r"python -m megatron\.bridge\.\w+ ", c)})
)
def test_its_options_exist(command):
    module, *arguments = shlex.split(command)[2:]
    if importlib.util.find_spec(module).submodule_search_locations is not None:
        module += ".__main__"
    parser = importlib.import_module(module).build_parser()
    if arguments == ["export"]:
        return  # named in a sentence, without its options
    parser.parse_args(arguments)


@pytest.mark.parametrize("command", sorted({c for _, c in commands() if c.startswith("make ")}))
def test_make_knows_it(command):
    result = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
