# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Estimate the memory of a recipe on each rank, with and without offload, and the offload fraction that makes it fit.

    python -m megatron.bridge.memory llama31_8b_sft_config optimizer.optimizer_offload_fraction=0.5 --world-size 4
    python -m megatron.bridge.memory llama31_405b_sft_config --world-size 1024 --rank 700 --gpu-gib 141

No GPU is needed: the rank's model and optimizer are built from tensors without memory.
"""

import argparse
from collections.abc import Sequence

from megatron.bridge.utils.exit_codes import exit_code_of, exit_with
from megatron.bridge.utils.interpolation import expand_home


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.bridge.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe's name, or module:function")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, e.g. train.micro_batch_size=2")
    parser.add_argument(
        "--hf-path", type=expand_home, help="take the sizes from this Hugging Face directory or hub name"
    )
    parser.add_argument("--world-size", type=int, help="ranks (default: as few as hold the model)")
    parser.add_argument("--rank", type=int, help="plan this rank (default: the one that needs most)")
    parser.add_argument("--shapes", action="store_true", help="list the rank's part of each weight too")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a device (default: 80)")
    parser.add_argument("--reserve-gib", type=float, default=4.0, help="of it, for CUDA and NCCL (default: 4)")
    return parser


def run(args: argparse.Namespace) -> str:
    """The plan as a table."""
    from megatron.bridge.recipes.build import RecipeRequest, smallest_world_size

    request = RecipeRequest(recipe=args.recipe, hf_path=args.hf_path, overrides=args.overrides)
    request.resolve()
    from megatron.bridge.utils.no_compile import import_core_without_compiling

    import_core_without_compiling()
    from megatron.bridge.planning.memory import GIB, as_table, plan_memory

    cfg = request.build()
    plan = plan_memory(
        cfg,
        world_size=args.world_size or smallest_world_size(cfg),
        budget_bytes=int((args.gpu_gib - args.reserve_gib) * GIB),
        rank=args.rank,
    )
    if not args.shapes:
        return as_table(plan)
    from megatron.bridge.planning.shards import as_table as shards_as_table
    from megatron.bridge.planning.shards import plan_shards

    shards = plan_shards(cfg, world_size=plan.world_size, rank=plan.rank)
    return f"{shards_as_table(shards)}\n\n{as_table(plan)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    args = build_parser().parse_intermixed_args(argv)
    return exit_code_of("memory", lambda: print(run(args)))


if __name__ == "__main__":
    exit_with(main)
