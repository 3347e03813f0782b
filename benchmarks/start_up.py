# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How long the commands take before they do anything: help, lists, imports, a recipe's configuration, a dry run.

    python -m benchmarks.start_up

Each figure is the time of a process from its start to its end, with its files in the page cache.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure, interleaved, run

ROOT = Path(__file__).parents[1]
RECIPE, LAUNCHER = "scripts/training/run_recipe.py", "scripts/training/launch_with_nemo_run.py"
COMMANDS = ("convert", "generate", "memory", "checkpoint", "plot")

QUICK = {
    "import megatron.bridge": ("-c", "import megatron.bridge"),
    "run_recipe.py --list": (RECIPE, "--list"),
    "run_recipe.py --help": (RECIPE, "--help"),
    "launch_with_nemo_run.py --help": (LAUNCHER, "--help"),
    **{f"megatron.bridge.{name} --help": ("-m", f"megatron.bridge.{name}", "--help") for name in COMMANDS},
}
"""Name and arguments of what must take less than a second."""

IMPORTS = ("-c", "import torch, megatron.core.models.gpt, megatron.core.optimizer, megatron.core.distributed")
CONFIG = ("-c", "from megatron.bridge.recipes import find_recipe; find_recipe('llama32_1b_sft_config')()")
SLOW = {
    "imports": IMPORTS,
    "a recipe's configuration": CONFIG,
    "dry run, SmolLM2-135M, 2 ranks": (RECIPE, "--recipe", "smollm2_135m_sft_config", "--dry-run", "--world-size=2"),
    "dry run, Llama 3.1 405B, 1024 ranks": (
        RECIPE,
        "--recipe",
        "llama31_405b_sft_config",
        "--dry-run",
        "--world-size=1024",
    ),
}
"""Likewise of what must take less than five; the first is not ours."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Start each command some times, in turn."""
    quick, slow = _seconds(QUICK, arguments.repeats), _seconds(SLOW, arguments.repeats)
    imports = median(slow.pop("imports"))
    note = f"a process that only imports torch and megatron-core took {imports:.1f} s, in turn with it"
    return [
        *(Figure(name, "", taken, at_most=1.0, unit="s") for name, taken in quick.items()),
        # Seconds depend on the machine: only a large excess is certainly a regression.
        *(Figure(name, "", taken, at_most=5.0, unit="s", fails_above=15.0, note=note) for name, taken in slow.items()),
    ]


def _seconds(commands: dict[str, tuple[str, ...]], repeats: int) -> dict[str, tuple[float, ...]]:
    rows = {name: partial(_start, command) for name, command in commands.items()}
    return interleaved(rows, repeats, settle=lambda: None)


def _start(command: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )


if __name__ == "__main__":
    run(measure, build_parser())
