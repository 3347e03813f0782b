# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Convert models between Hugging Face directories and Megatron checkpoints.

    python -m megatron.bridge.convert import    --hf-model DIR --megatron-path CKPT
    python -m megatron.bridge.convert export    --megatron-path CKPT --hf-path DIR
    python -m megatron.bridge.convert roundtrip --hf-model DIR

Models larger than one process's memory convert under torchrun with --tp and --pp.
"""

import argparse
import sys
from collections.abc import Sequence


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.bridge.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    importing = commands.add_parser("import", help="Hugging Face directory -> Megatron checkpoint")
    importing.add_argument("--hf-model", required=True, help="directory, or name on the Hugging Face hub")
    importing.add_argument("--megatron-path", required=True, help="directory of the checkpoint to write")

    exporting = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face directory")
    exporting.add_argument("--megatron-path", required=True, help="directory of checkpoints, or one iter_N in it")
    exporting.add_argument("--hf-path", required=True, help="directory to write")
    exporting.add_argument(
        "--hf-model", help="where configuration and tokenizer come from; default: the model that was imported"
    )

    roundtrip = commands.add_parser("roundtrip", help="prove that a model survives both ways bit by bit")
    roundtrip.add_argument("--hf-model", required=True, help="directory, or name on the Hugging Face hub")

    for command in (importing, exporting, roundtrip):
        command.add_argument("--tp", type=int, default=1, help="tensor-parallel size while converting (default 1)")
        command.add_argument("--pp", type=int, default=1, help="pipeline-parallel size while converting (default 1)")
        command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def run_import(args: argparse.Namespace) -> str:
    """Hugging Face directory -> Megatron checkpoint; returns what was done."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    written = AutoBridge.import_ckpt(
        args.hf_model,
        args.megatron_path,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        show_progress=not args.no_progress,
    )
    return f"imported {args.hf_model} to {written}"


def run_export(args: argparse.Namespace) -> str:
    """Megatron checkpoint -> Hugging Face directory; returns what was done."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    hf_model = args.hf_model or AutoBridge.get_hf_model_id_from_checkpoint(args.megatron_path)
    if hf_model is None:
        raise ValueError(f"{args.megatron_path} doesn't say which model it came from: pass --hf-model")
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(
        args.megatron_path,
        args.hf_path,
        show_progress=not args.no_progress,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
    )
    return f"exported {args.megatron_path} to {args.hf_path}"


def run_roundtrip(args: argparse.Namespace) -> str:
    """Load and export in memory, comparing every tensor with the files; returns what was found.

    Raises:
        ValueError: A tensor differs.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(args.hf_model)
    num_equal, differing = bridge.check_roundtrip(
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        show_progress=not args.no_progress,
    )
    if differing:
        raise ValueError(f"{args.hf_model}: {len(differing)} tensors don't survive, {num_equal} do: {differing[0]}")
    return f"{args.hf_model}: all {num_equal} tensors are bit-equal after Hugging Face -> Megatron -> Hugging Face"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    args = build_parser().parse_args(argv)
    from megatron.bridge.utils.distributed import is_rank_0
    from megatron.bridge.utils.logging import setup_logging

    setup_logging()
    command = {"import": run_import, "export": run_export, "roundtrip": run_roundtrip}[args.command]
    try:
        done = command(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    if is_rank_0():
        print(done)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
