# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Train as a recipe says.

    torchrun --nproc-per-node 8 scripts/training/run_recipe.py --recipe llama32_1b_sft_config \
        --hf-path models/Llama-3.2-1B dataset.dataset_root=data/mine
    torchrun --nproc-per-node 8 scripts/training/run_recipe.py --model llama32_1b --mode lora \
        --hf-path models/Llama-3.2-1B --dataset data/mine -ms 500 -gb 64 -tp 2 --lr 1e-4 --save-dir results/mine
    python scripts/training/run_recipe.py --list
    python scripts/training/run_recipe.py --recipe llama31_405b_sft_config --dry-run --world-size 1024

The recipe comes first, then the Hugging Face directory, the options, the YAML file, and key=value, which has the last
word. What stands for a key=value counts as one.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron.bridge.recipes import all_recipes
from megatron.bridge.recipes.build import MODES, PEFT_SCHEMES, RecipeRequest
from megatron.bridge.recipes.launch import train_recipe
from megatron.bridge.recipes.shorthands import add_shorthands, overrides_of
from megatron.bridge.utils.exit_codes import exit_code_of, exit_with
from megatron.bridge.utils.interpolation import expand_home


def build_parser() -> argparse.ArgumentParser:
    """The command line; options are taken with underscores too, as in Megatron Bridge 0.3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show all recipes and end")
    parser.add_argument(
        "--recipe",
        "--model",
        help="a name from --list; with --mode its first part or a hub name; or module:function",
    )
    parser.add_argument("--mode", choices=tuple(MODES), help="default: as the recipe's name says")
    _add(parser, "--peft-scheme", choices=PEFT_SCHEMES, help="kind of adapters (default: lora)")
    _add(
        parser,
        "--hf-path",
        type=expand_home,
        help="take sizes, weights and tokenizer from this Hugging Face directory, or model on the hub",
    )
    parser.add_argument(
        "-sl", "--seq-length", "--seq_length", type=int, help="longest sample in tokens (default: the recipe's)"
    )
    _add(parser, "--packed-sequence", action="store_true", help="pack several samples into each row")
    parser.add_argument("--deterministic", action="store_true", help="add in one order, whatever it costs on a GPU")
    _add(parser, "--step-func", default="gpt_step", help="gpt_step, or module:function (default: %(default)s)")
    _add(parser, "--config-file", type=expand_home, help="YAML with options to set before the overrides")
    _add(parser, "--dry-run", action="store_true", help="show the resolved configuration and its memory, and end")
    _add(parser, "--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--rank", type=int, help="with --dry-run: plan this rank (default: the one that needs most)")
    _add(parser, "--gpu-gib", type=float, default=80.0, help="with --dry-run: memory of a device (default: 80)")
    _add(parser, "--reserve-gib", type=float, default=4.0, help="of it, for CUDA and NCCL (default: 4)")
    add_shorthands(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, e.g. train.train_iters=50")
    return parser


def _add(parser: argparse.ArgumentParser, option: str, **settings: Any) -> None:
    parser.add_argument(option, f"--{option[2:].replace('-', '_')}", **settings)


def run(arguments: argparse.Namespace) -> None:
    """Build the configuration, and train or plan."""
    request = RecipeRequest(
        recipe=arguments.recipe,
        mode=arguments.mode,
        peft_scheme=arguments.peft_scheme,
        hf_path=arguments.hf_path,
        seq_length=arguments.seq_length,
        packed_sequence=arguments.packed_sequence,
        deterministic=arguments.deterministic,
        config_file=arguments.config_file,
        overrides=[*overrides_of(arguments), *arguments.overrides],
    )
    request.resolve()  # a wrong name is said before torch is imported
    if not arguments.dry_run:
        train_recipe(request, step_func=arguments.step_func)
    elif os.environ.get("RANK", "0") == "0":
        plan(request, arguments)


def plan(request: RecipeRequest, arguments: argparse.Namespace) -> None:
    """Show what a run would be told, and the memory it would need."""
    from megatron.bridge.utils.no_compile import import_core_without_compiling

    import_core_without_compiling()
    from megatron.bridge.planning.memory import GIB, as_table, plan_memory, resolve
    from megatron.bridge.recipes.build import smallest_world_size

    cfg = request.build()
    world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", smallest_world_size(cfg)))
    resolved, left_open = resolve(cfg, world_size=world_size)
    print(resolved.to_yaml())
    budget = int((arguments.gpu_gib - arguments.reserve_gib) * GIB)
    print(as_table(plan_memory(cfg, world_size=world_size, budget_bytes=budget, rank=arguments.rank)))
    if left_open:
        print(f"still to set: {', '.join(left_open)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list:
        print("\n".join(sorted(all_recipes())))
        return 0
    if arguments.recipe is None:
        parser.error("--recipe is missing: --list shows all")
    return exit_code_of("run_recipe", lambda: run(arguments))


if __name__ == "__main__":
    exit_with(main)
