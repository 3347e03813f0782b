# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Convert models between Hugging Face directories and Megatron checkpoints.

    python -m megatron.bridge.convert import         --hf-model DIR --megatron-path CKPT
    python -m megatron.bridge.convert export         --megatron-path CKPT --hf-path DIR
    python -m megatron.bridge.convert export-adapter --megatron-path ADAPTERS --hf-path DIR
    python -m megatron.bridge.convert merge          --megatron-path ADAPTERS --output CKPT
    python -m megatron.bridge.convert roundtrip      --hf-model DIR

Models larger than one process's memory are converted under torchrun, split by --tp, --pp and --ep. The result doesn't
depend on the split: a checkpoint can be loaded at any layout.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.utils.command_options import DTYPES, add_checkpoint_options
from megatron.bridge.utils.exit_codes import exit_with
from megatron.bridge.utils.interpolation import expand_home
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

_SIZES = {short.lower(): PARALLEL_SIZES[short] for short in ("TP", "PP", "VP", "EP", "ETP")}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.bridge.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    importing = commands.add_parser("import", help="Hugging Face directory -> Megatron checkpoint")
    importing.add_argument(
        "--hf-model", type=expand_home, required=True, help="directory, or name on the Hugging Face hub"
    )
    importing.add_argument(
        "--megatron-path", type=expand_home, required=True, help="directory of the checkpoint to write"
    )

    exporting = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face directory, adapters merged")
    adapting = commands.add_parser("export-adapter", help="checkpoint of adapters -> directory for the peft library")
    merging = commands.add_parser("merge", help="checkpoint of adapters -> Megatron checkpoint of the whole model")
    for command in (exporting, adapting, merging):
        add_checkpoint_options(command, with_base=command is not adapting)
    for command in (exporting, adapting):
        command.add_argument("--hf-path", type=expand_home, required=True, help="directory to write")
    merging.add_argument("--output", type=expand_home, required=True, help="directory of the checkpoint to write")

    roundtrip = commands.add_parser("roundtrip", help="prove that converting a model both ways is bit-exact")
    roundtrip.add_argument(
        "--hf-model", type=expand_home, required=True, help="directory, or name on the Hugging Face hub"
    )

    for command in (importing, exporting):
        command.add_argument(
            "--dtype", "--torch-dtype", choices=DTYPES, help="of the weights written (default: as they are)"
        )
    exporting.add_argument("--not-strict", action="store_true", help="let tensor names differ from the model's own")
    importing.add_argument("--device-map", help="accepted, as by Megatron Bridge: weights are read slice by slice")
    for command in (importing, exporting, adapting, merging, roundtrip):
        for option, size in _SIZES.items():
            command.add_argument(f"--{option}", type=int, help=f"{size.meaning}, while converting")
        command.add_argument("--no-progress", action="store_true", help="show no progress bar")
        command.add_argument(
            "--trust-remote-code", action="store_true", help="accepted; no code of the model's directory is run"
        )
    return parser


def parallel_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes that were given, by their names in a provider."""
    given = {size.field: getattr(args, option) for option, size in _SIZES.items()}
    return {name: size for name, size in given.items() if size is not None}


def run_import(args: argparse.Namespace) -> str:
    """Hugging Face directory -> Megatron checkpoint; returns what was done."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    written = AutoBridge.import_ckpt(
        args.hf_model,
        args.megatron_path,
        dtype=args.dtype,
        show_progress=not args.no_progress,
        trust_remote_code=args.trust_remote_code,
        **parallel_sizes(args),
    )
    return f"imported {args.hf_model} to {written}"


def run_export(args: argparse.Namespace) -> str:
    """Megatron checkpoint -> Hugging Face directory; returns what was done."""
    _bridge_of(args).export_ckpt(
        args.megatron_path,
        args.hf_path,
        show_progress=not args.no_progress,
        strict=not args.not_strict,
        dtype=args.dtype,
        base=args.base,
        **parallel_sizes(args),
    )
    return f"exported {args.megatron_path} to {args.hf_path}"


def run_export_adapter(args: argparse.Namespace) -> str:
    """Checkpoint of adapters -> directory for the peft library; returns what was done."""
    _bridge_of(args).export_adapter_ckpt(
        args.megatron_path, args.hf_path, show_progress=not args.no_progress, **parallel_sizes(args)
    )
    return f"exported the adapters in {args.megatron_path} to {args.hf_path}"


def run_merge(args: argparse.Namespace) -> str:
    """Checkpoint of adapters -> Megatron checkpoint of the whole model; returns what was done."""
    from megatron.bridge.peft.adapted_linear import merge_adapters
    from megatron.bridge.utils.distributed import model_parallel_groups

    bridge = _bridge_of(args)
    with model_parallel_groups(**parallel_sizes(args)):
        chunks = bridge.load_megatron_model(args.megatron_path, base=args.base, use_cpu_initialization=True)
        count = merge_adapters(chunks)
        if count == 0:
            raise ValueError(f"{args.megatron_path} holds a whole model: there are no adapters to merge")
        written = bridge.save_megatron_model(chunks, args.output, checkpoint=args.megatron_path)
    return f"merged {count} adapters of this process into {written}"


def _bridge_of(args: argparse.Namespace) -> "AutoBridge":
    """The bridge of a Megatron checkpoint's model."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    return AutoBridge.from_megatron_checkpoint(args.megatron_path, args.hf_model)


def run_roundtrip(args: argparse.Namespace) -> str:
    """Import and export in memory, and compare every tensor with the files. Returns a table of the results.

    Raises:
        TensorsDiffer: At least one tensor differs.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.conversion.roundtrip import as_table

    bridge = AutoBridge.from_hf_pretrained(args.hf_model)
    results = bridge.check_roundtrip(show_progress=not args.no_progress, **parallel_sizes(args))
    table = as_table(results)
    differing = sum(not one.is_equal for one in results)
    if differing:
        raise TensorsDiffer(f"{table}\n{args.hf_model}: {differing} of {len(results)} tensors differ")
    return f"{table}\n{args.hf_model}: all {len(results)} tensors are bit-exact after Hugging Face -> Megatron -> back"


class TensorsDiffer(Exception):
    """A round trip was not bit-exact. The text is the table of results."""


COMMANDS = {
    "import": run_import,
    "export": run_export,
    "export-adapter": run_export_adapter,
    "merge": run_merge,
    "roundtrip": run_roundtrip,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    args = build_parser().parse_args(argv)
    from megatron.bridge.utils.distributed import is_rank_0
    from megatron.bridge.utils.logging import setup_logging

    setup_logging()
    try:
        done, status = COMMANDS[args.command](args), 0
    except TensorsDiffer as found:
        done, status = str(found), 1
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    if is_rank_0():
        print(done)
    return status


if __name__ == "__main__":
    exit_with(main)
