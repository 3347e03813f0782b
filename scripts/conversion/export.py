# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Megatron checkpoint -> Hugging Face directory: `python -m megatron.bridge.convert export`.

python scripts/conversion/export.py --megatron-path CKPT --hf-path DIR
"""

import sys

from megatron.bridge import convert
from megatron.bridge.utils.exit_codes import exit_with


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    return convert.main(["export", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    exit_with(main)
