# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Show the content of a checkpoint, or verify it.

    python -m megatron.bridge.checkpoint inspect DIR    what is in it
    python -m megatron.bridge.checkpoint verify  DIR    each file against its checksum

DIR is a directory of checkpoints, or one iter_N in it. Nothing that a checkpoint holds is executed.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron.bridge.utils.exit_codes import exit_with
from megatron.bridge.utils.interpolation import expand_home


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.bridge.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (("inspect", "what is in it"), ("verify", "each file against its checksum")):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("directory", type=expand_home, help="directory of checkpoints, or one iter_N in it")
        command.add_argument("--ckpt-step", type=int, help="this iteration (default: the latest)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 where a file is damaged or there is no checkpoint.
    """
    args = build_parser().parse_args(argv)
    from megatron.bridge.checkpoint import inspection

    try:
        if args.command == "verify":
            lines, damaged = inspection.verify(args.directory, args.ckpt_step)
        else:
            lines, damaged = inspection.inspect(args.directory, args.ckpt_step), 0
    except (ValueError, FileNotFoundError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 1 if damaged else 0


if __name__ == "__main__":
    exit_with(main)
