# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From nothing to a finetuned model: fetch, convert, finetune, evaluate, export, compare. `make finetune` runs it."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run the stages in order; the first that fails ends the run with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/smollm2"), help="everything made goes here")
    parser.add_argument("--model", type=Path, default=Path("data/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=Path("data/chatterbot"))
    parser.add_argument("--num-processes", type=int, help="default: one for each GPU, or 2 on a CPU")
    parser.add_argument(
        "--stock-iters",
        type=int,
        default=4,
        help="steps of a second run that leaves the optimizer as Megatron-Core does, for the picture; 0 leaves it out",
    )
    parser.add_argument("overrides", nargs="*", help="key=value for the run, e.g. train.train_iters=50")
    arguments = parser.parse_args()
    started = time.monotonic()
    paths = fresh_paths(arguments.output)

    step("1/7 model", script("prepare_model.py", "--output", arguments.model))
    step("2/7 data", script("prepare_data.py", "--output", arguments.data))
    convert = [sys.executable, "-m", "megatron.bridge.convert"]
    hf_model = ["--hf-model", arguments.model]
    step("3/7 import to Megatron", [*convert, "import", *hf_model, "--megatron-path", paths["pretrained"]])
    train = [*launcher(arguments.num_processes), HERE / "train.py", "--data", arguments.data]
    train += ["--model", arguments.model, "--pretrained-checkpoint", paths["pretrained"]]
    step("4/7 finetune", [*train, "--output", arguments.output, *arguments.overrides])
    if arguments.stock_iters:
        stock = ["checkpoint.save=null", "checkpoint.load=null", "validation.eval_iters=0"]
        stock += ["scheduler.lr_decay_iters=30", *arguments.overrides, f"train.train_iters={arguments.stock_iters}"]
        step(
            "5/7 the same without the sync, for the picture",
            [*train, "--output", paths["stock"], "--stock-megatron-core", *stock],
        )
    exported = ["--megatron-path", paths["checkpoints"], "--hf-path", paths["exported"]]
    step("6/7 export to Hugging Face", [*convert, "export", *hf_model, *exported])
    report = ["--base", arguments.model, "--finetuned", paths["exported"], "--data", arguments.data]
    report += ["--metrics", paths["metrics"], "--stock-metrics", paths["stock"] / "metrics.jsonl"]
    step("7/7 picture and answers", script("report.py", *report, "--picture", paths["picture"]))
    print(f"\nmade in {time.monotonic() - started:.0f} s:")
    for name, what in (
        ("exported", "Hugging Face directory of the finetuned model"),
        ("checkpoints", "Megatron checkpoint with optimizer state; scripts/finetune_smollm2/train.py resumes from it"),
        ("picture", "loss with and without the sync"),
        ("metrics", "one line for each step and evaluation"),
        ("tensorboard", "tensorboard --logdir"),
    ):
        print(f"  {str(paths[name]):42} {what}")


def fresh_paths(output: Path) -> dict[str, Path]:
    """The places below the output directory; what an earlier demonstration made there is removed."""
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


def script(name: str, *arguments: object) -> list[object]:
    """A command that runs a script beside this one."""
    return [sys.executable, HERE / name, *arguments]


def launcher(num_processes: int | None) -> list[object]:
    """Start processes on this machine, with one process for each GPU, or two where there is none."""
    if num_processes is None:
        import torch

        num_processes = torch.cuda.device_count() or 2
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]


def step(title: str, command: list[object]) -> None:
    """Run one stage and say how long it took."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    code = subprocess.run([str(part) for part in command], env=environment, check=False).returncode
    if code:
        raise SystemExit(f"{title} failed with exit code {code}; the lines above say why")
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
