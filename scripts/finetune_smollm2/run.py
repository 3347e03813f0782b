# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From nothing to a finetuned model: fetch, convert, finetune, evaluate, export, compare. `make finetune` runs it."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron.bridge.utils.command_options import local_path

HERE = Path(__file__).parent
# One thread a process: several ranks that each take all cores are slower than one. Core warns at length on import.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Run the stages in order; the first that fails ends the run with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=local_path, default=Path("results/smollm2"), help="directory for all results")
    parser.add_argument("--model", type=local_path, default=Path("data/smollm2-135m-instruct"))
    parser.add_argument("--data", type=local_path, default=Path("data/chatterbot"))
    parser.add_argument("--num-processes", type=int, help="default: one for each GPU, or 2 on a CPU")
    parser.add_argument(
        "--stock-iters",
        type=int,
        default=3,
        help="steps of a second run without the sync, for the picture; 0: no such run",
    )
    parser.add_argument("overrides", nargs="*", help="key=value for the run, e.g. train.train_iters=50")
    arguments = parser.parse_args()
    refuse_wrong_overrides(arguments.overrides)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = time.monotonic()
    paths = fresh_paths(arguments.output)

    step("1/7 model", HERE / "prepare_model.py", ["--output", arguments.model])
    step("2/7 data", HERE / "prepare_data.py", ["--output", arguments.data])
    convert = "megatron.bridge.convert"
    hf_model = ["--hf-model", arguments.model]
    step("3/7 import to Megatron", "-m", [convert, "import", *hf_model, "--megatron-path", paths["pretrained"]])
    train = ["--model", arguments.model, "--data", arguments.data, "--pretrained-checkpoint", paths["pretrained"]]
    num_processes = arguments.num_processes or default_num_processes()
    ours = [*train, "--output", arguments.output, *arguments.overrides]
    step("4/7 finetune", HERE / "train.py", ours, num_processes)
    if arguments.stock_iters:
        stock = ["scheduler.lr_decay_iters=25", *arguments.overrides, f"train.train_iters={arguments.stock_iters}"]
        stock += ["checkpoint.save=null", "checkpoint.load=null", "validation.eval_iters=0"]
        stock = [*train, "--output", paths["stock"], "--stock-megatron-core", *stock]
        step("5/7 the same without the sync, for the picture", HERE / "train.py", stock, num_processes)
    exported = ["--megatron-path", paths["checkpoints"], "--hf-path", paths["exported"]]
    step("6/7 export to Hugging Face", "-m", [convert, "export", *hf_model, *exported])
    report = ["--base", arguments.model, "--finetuned", paths["exported"], "--data", arguments.data]
    report += ["--metrics", paths["metrics"], "--stock-metrics", paths["stock"] / "metrics.jsonl"]
    step("7/7 picture and answers", HERE / "report.py", [*report, "--picture", paths["picture"]])
    print(f"\nmade in {time.monotonic() - started:.0f} s:")
    for name, what in (
        ("exported", "Hugging Face directory of the finetuned model"),
        ("checkpoints", "Megatron checkpoint with optimizer state; scripts/finetune_smollm2/train.py resumes from it"),
        ("picture", "loss with and without the sync"),
        ("metrics", "one line for each step and evaluation"),
        ("tensorboard", "tensorboard --logdir"),
    ):
        print(f"  {str(paths[name]):42} {what}")


def refuse_wrong_overrides(overrides: list[str], peft: str | None = None) -> None:
    """End with one line, before results of an earlier run are removed and models are fetched and converted."""
    if overrides:
        from train import check_overrides  # imports Megatron-Core, which takes seconds

        try:
            check_overrides(overrides, peft)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None


def fresh_paths(output: Path) -> dict[str, Path]:
    """The paths below the output directory; removes what an earlier run of this script made there."""
    names = {
        "pretrained": "pretrained",
        "checkpoints": "checkpoints",
        "exported": "finetuned-hf",
        "picture": "loss.png",
        "metrics": "metrics.jsonl",
        "tensorboard": "tensorboard",
        "stock": "without-sync",
    }
    paths = {name: output / place for name, place in names.items()}
    for path in paths.values():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return paths


def default_num_processes() -> int:
    """One process for each GPU, or two on a machine without one."""
    return torch.cuda.device_count() or 2


def step(title: str, script: Path | str, arguments: list[object], num_processes: int = 0) -> None:
    """Run one stage and say how long it took.

    Args:
        title: Shown before it runs.
        script: A file, or `-m` for a module.
        arguments: Its command line.
        num_processes: Ranks to start it on, as torchrun does; 0 starts it as a plain process.
    """
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    command = [str(part) for part in (script, *arguments)]
    if num_processes:
        failed = not launch_ranks(command, num_processes)
    else:
        failed = subprocess.run([sys.executable, *command], check=False).returncode != 0
    if failed:
        raise SystemExit(f"{title} failed; the lines above say why")
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def launch_ranks(command: list[str], num_processes: int) -> bool:
    """Run a script as `torchrun --standalone` does, without its traceback; returns whether all ranks succeeded."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="finetune_smollm2",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError:
        return False
    return True


if __name__ == "__main__":
    main()
