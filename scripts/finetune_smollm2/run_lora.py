# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA from nothing: fetch, train adapters, export them for peft, merge them, compare. `make finetune-lora` runs it."""

import argparse
import os
import shutil
import time
from pathlib import Path

from run import ENVIRONMENT, HERE, default_num_processes, refuse_wrong_overrides, step

from megatron.bridge.utils.command_options import local_path


def main() -> None:
    """Run the stages in order; the first that fails ends the run with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=local_path, default=Path("results/smollm2-lora"), help="directory for all results"
    )
    parser.add_argument("--model", type=local_path, default=Path("data/smollm2-135m-instruct"))
    parser.add_argument("--data", type=local_path, default=Path("data/chatterbot"))
    parser.add_argument("--num-processes", type=int, help="default: one for each GPU, or 2 on a CPU")
    parser.add_argument("--peft", choices=("lora", "dora", "canonical_lora"), default="lora")
    parser.add_argument("overrides", nargs="*", help="key=value for the run, e.g. peft.dim=8")
    arguments = parser.parse_args()
    refuse_wrong_overrides(arguments.overrides, arguments.peft)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = time.monotonic()
    output = arguments.output
    places = {name: output / name for name in ("checkpoints", "adapter", "merged-hf", "tensorboard", "metrics.jsonl")}
    for path in places.values():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    step("1/6 model", HERE / "prepare_model.py", ["--output", arguments.model])
    step("2/6 data", HERE / "prepare_data.py", ["--output", arguments.data])
    train = ["--model", arguments.model, "--data", arguments.data, "--pretrained-checkpoint", arguments.model]
    train += ["--peft", arguments.peft, "--output", output, *arguments.overrides]
    step("3/6 train adapters", HERE / "train.py", train, arguments.num_processes or default_num_processes())
    convert = "megatron.bridge.convert"
    adapters = ["--hf-model", arguments.model, "--megatron-path", places["checkpoints"]]
    step("4/6 export for peft", "-m", [convert, "export-adapter", *adapters, "--hf-path", places["adapter"]])
    step("5/6 merge and export", "-m", [convert, "export", *adapters, "--hf-path", places["merged-hf"]])
    report = ["--base", arguments.model, "--adapter", places["adapter"], "--merged", places["merged-hf"]]
    report += ["--megatron-path", places["checkpoints"], "--data", arguments.data]
    step("6/6 compare", HERE / "report_lora.py", [*report, "--metrics", places["metrics.jsonl"]])
    print(f"\nmade in {time.monotonic() - started:.0f} s:")
    for name, what in (
        ("adapter", "for peft.PeftModel.from_pretrained"),
        ("merged-hf", "Hugging Face directory of the model with the adapters in its weights"),
        ("checkpoints", "Megatron checkpoint of the adapters with optimizer state; train.py resumes from it"),
        ("metrics.jsonl", "one line for each step and evaluation"),
        ("tensorboard", "tensorboard --logdir"),
    ):
        print(f"  {str(places[name]):36} {what}")


if __name__ == "__main__":
    main()
