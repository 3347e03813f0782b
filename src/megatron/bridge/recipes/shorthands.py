# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Short options of a command line for the values that users change most; each stands for one `key=value`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.presets import DATASETS
from megatron.bridge.utils.hf_hub import is_hub_name
from megatron.bridge.utils.interpolation import expand_home
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES


@dataclass(frozen=True)
class Shorthand:
    """One option."""

    names: tuple[str, ...]
    """As it is typed; the last one is long. Hyphens may be underscores."""

    key: str
    """The option of the configuration that it sets."""

    type: Callable[[str], Any]
    """What its text becomes."""


SHORTHANDS = (
    Shorthand(("-ms", "--max-steps"), "train.train_iters", int),
    Shorthand(("-gb", "--global-batch-size"), "train.global_batch_size", int),
    Shorthand(("-mb", "--micro-batch-size"), "train.micro_batch_size", int),
    *(
        Shorthand((f"-{short.lower()}", f"--{size.field.replace('_', '-')}"), f"model.{size.field}", int)
        for short, size in PARALLEL_SIZES.items()
    ),
    Shorthand(("--lr",), "optimizer.lr", float),
    Shorthand(("--min-lr",), "optimizer.min_lr", float),
    Shorthand(("--warmup-iters",), "scheduler.lr_warmup_iters", int),
    Shorthand(("--pretrained-checkpoint",), "checkpoint.pretrained_checkpoint", expand_home),
    Shorthand(("--save-dir",), "checkpoint.save", expand_home),
    Shorthand(("--load-dir",), "checkpoint.load", expand_home),
    Shorthand(("--save-interval",), "checkpoint.save_interval", int),
)


def add_shorthands(parser: argparse.ArgumentParser) -> None:
    """Give a parser all of them, and `--dataset`."""
    group = parser.add_argument_group("in short for key=value, which has the last word")
    for short in SHORTHANDS:
        names = [name for spelt in short.names for name in dict.fromkeys((spelt, _with_underscores(spelt)))]
        group.add_argument(*names, dest=short.key, type=short.type, metavar="VALUE", help=short.key)
    group.add_argument(
        "--dataset",
        type=expand_home,
        metavar="NAME",
        help=f"a directory of JSONL files or a saved dataset, owner/name on the hub, or {', '.join(DATASETS)}",
    )


def _with_underscores(name: str) -> str:
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The `key=value` that the short options stand for.

    Raises:
        ValueError: `--dataset` is neither a directory nor a dataset's name.
    """
    given = {short.key: getattr(arguments, short.key) for short in SHORTHANDS}
    if arguments.dataset is not None:
        given |= {"dataset.dataset_root": "", **_dataset_options(arguments.dataset)}
    return [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None]


def _quoted(value: Any) -> str:
    """A value as an override has it: a text between quotes, so that `1e3` or `a: b` stays a text."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def _dataset_options(dataset: str) -> dict[str, str]:
    directory = Path(dataset)
    if directory.is_dir():
        has_training_lines = (directory / "training.jsonl").exists()
        return {"dataset.dataset_root" if has_training_lines else "dataset.hf_dataset": dataset}
    if dataset in DATASETS or directory.is_file() or ("/" in dataset and is_hub_name(dataset)):
        return {"dataset.hf_dataset": dataset}
    raise ValueError(
        f"--dataset {dataset}: there is no such directory; expected one with training.jsonl, one that save_to_disk "
        f"wrote, a dataset of the hub as owner/name, or one of {', '.join(DATASETS)}"
    )
