# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Groups of command-line options that a script for generating text is put together from.

Long options are taken with underscores too. Importing this module is cheap, so that `--help` is.
"""

import argparse
from typing import Any

from megatron.bridge.utils.command_options import DTYPES
from megatron.bridge.utils.interpolation import expand_home
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES

SIZES = {short.lower(): PARALLEL_SIZES[short] for short in ("TP", "PP", "EP", "ETP")}

Group = argparse._ArgumentGroup


def add_model_loading_args(parser: argparse.ArgumentParser) -> Group:
    """Add the options that name the model to load."""
    group = parser.add_argument_group("model")
    _add(
        group,
        "--hf-model-path",
        "--hf-model",
        type=expand_home,
        help="directory or hub name of a Hugging Face model; with --megatron-model-path: the one it came from",
    )
    _add(
        group,
        "--megatron-model-path",
        "--megatron-path",
        type=expand_home,
        help="directory of Megatron checkpoints, or one iter_N in it",
    )
    group.add_argument("--base", type=expand_home, help="weights under adapters (default: those they were trained on)")
    _add(group, "--dtype", "--torch-dtype", choices=DTYPES, help="to compute in (default: the model's)")
    _add(group, "--trust-remote-code", action="store_true", help="accepted; no code of the model's directory is run")
    return group


def add_parallelism_args(parser: argparse.ArgumentParser) -> Group:
    """Add the parallel sizes."""
    group = parser.add_argument_group("parallelism")
    for short, size in SIZES.items():
        long = "--" + size.field.replace("_", "-")
        _add(group, f"--{short}", long, type=int, default=size.default, help=size.meaning)
    return group


def add_distributed_args(parser: argparse.ArgumentParser) -> Group:
    """Add the options of the process group and of the device."""
    group = parser.add_argument_group("processes")
    group.add_argument("--device", choices=("auto", *DEVICES), default="auto", help="default: a GPU where there is one")
    _add(
        group,
        "--distributed-backend",
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="default: NCCL on GPUs, else gloo",
    )
    _add(
        group,
        "--distributed-timeout-minutes",
        type=float,
        default=10.0,
        help="an operation of all ranks fails after this long (default: %(default)s)",
    )
    return group


DEVICES = ("cuda", "cpu")


def add_engine_args(parser: argparse.ArgumentParser) -> Group:
    """Add the options of the engine."""
    group = parser.add_argument_group("engine")
    _add(
        group,
        "--max-sequence-length",
        "--inference-max-seq-length",
        type=int,
        default=2560,
        help="most tokens of a prompt and its continuation (default: %(default)s)",
    )
    _add(
        group,
        "--max-requests",
        "--max-batch-size",
        "--inference-max-requests",
        type=int,
        default=8,
        help="most prompts that are continued together (default: %(default)s)",
    )
    _add(
        group,
        "--buffer-size-gb",
        type=float,
        default=20.0,
        help="most memory of a rank for the cache of keys and values, in GiB (default: %(default)s)",
    )
    for option, (kind, text) in OF_THE_DYNAMIC_ENGINE.items():
        settings: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        _add(group, option, help=f"{text}: of Core's dynamic engine on a GPU alone", **settings)
    return group


OF_THE_DYNAMIC_ENGINE: dict[str, tuple[type, str]] = {
    "--block-size-tokens": (int, "tokens in a block of the cache"),
    "--max-tokens": (int, "most tokens in a pass"),
    "--num-cuda-graphs": (int, "CUDA graphs to capture"),
    "--enable-chunked-prefill": (bool, "read long prompts in pieces"),
    "--enable-prefix-caching": (bool, "share the cache of equal beginnings"),
}
"""Options of Core's engine for batches that change while it runs: their type, and what they say."""


def add_prompt_args(parser: argparse.ArgumentParser) -> Group:
    """Add the options that give the prompts."""
    group = parser.add_argument_group("prompts")
    _add(group, "--prompts", "--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    _add(
        group,
        "--prompt-file",
        type=expand_home,
        help='a text file with a prompt in each line, or .jsonl or .json with strings or {"prompt": ...}',
    )
    _add(group, "--prompt-file-num-truncate", type=int, metavar="N", help="take the first N prompts of the file")
    group.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    group.add_argument("--system", help="with --chat: the system message")
    return group


class NotGiven(float):
    """A default that can be told from the same number on a command line."""


def add_sampling_args(parser: argparse.ArgumentParser) -> Group:
    """Add the options that say how tokens are chosen, and how many."""
    group = parser.add_argument_group("sampling")
    _add(
        group,
        "--num-tokens-to-generate",
        "--max-new-tokens",
        type=int,
        default=30,
        help="new tokens of each prompt (default: %(default)s)",
    )
    group.add_argument("--temperature", type=float, default=NotGiven(1), help="0: the likeliest (default: %(default)s)")
    _add(
        group,
        "--top-k",
        type=int,
        help="draw among this many; 0: among all (default: 1, the likeliest, without --temperature and --top-p)",
    )
    _add(group, "--top-p", type=float, default=0.0, help="draw among the likeliest with this probability; 0: among all")
    group.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    _add(group, "--stop-words", nargs="+", action="extend", metavar="TEXT", help="end a text behind one of these")
    _add(group, "--add-bos", action="store_true", help="begin with BOS though the tokenizer doesn't put it")
    _add(group, "--ignore-eos", action="store_true", help="don't end a text at an end token")
    return group


def _add(group: Group, *names: str, **settings: Any) -> None:
    spelled = dict.fromkeys(one for name in names for one in (name, "--" + name[2:].replace("-", "_")))
    group.add_argument(*spelled, **settings)
