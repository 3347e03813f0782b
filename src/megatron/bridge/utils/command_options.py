# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands have."""

import argparse
from pathlib import Path

from megatron.bridge.utils.interpolation import expand_home

DTYPES = ("float32", "bfloat16", "float16")


def local_path(text: str) -> Path:
    """An argument that is a path here; `~` at its start is the home directory, which a shell leaves in `--output=~/x`.

    Raises:
        ValueError: There is no such user.
    """
    return Path(expand_home(text))


def add_checkpoint_options(parser: argparse.ArgumentParser, *, with_base: bool) -> None:
    """Add the options for the checkpoint to read and for the model that it came from.

    Args:
        parser: The command's parser.
        with_base: Add an option for the weights under adapters.
    """
    parser.add_argument(
        "--megatron-path", type=expand_home, required=True, help="directory of checkpoints, or one iter_N in it"
    )
    parser.add_argument(
        "--hf-model",
        type=expand_home,
        help="directory or hub name of the model that it came from (default: as the checkpoint says); gives the "
        "configuration, and the tokenizer where the checkpoint has none",
    )
    if with_base:
        parser.add_argument(
            "--base", type=expand_home, help="weights under adapters (default: those that they were trained on)"
        )
