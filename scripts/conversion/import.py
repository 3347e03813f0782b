# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face directory -> Megatron checkpoint: `python -m megatron.bridge.convert import`.

python scripts/conversion/import.py --hf-model DIR --megatron-path CKPT
"""

import sys

from megatron.bridge import convert
from megatron.bridge.utils.exit_codes import exit_with


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    return convert.main(["import", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    exit_with(main)
