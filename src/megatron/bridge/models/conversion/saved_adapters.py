# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that holds adapters only: what they are, what they stand beside, and how they come into a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from megatron.bridge.checkpoint import layout
from megatron.bridge.checkpoint.model_checkpoint import load_model_weights, read_run_config
from megatron.bridge.utils.yaml_io import from_yaml_dict


@dataclass(frozen=True)
class SavedAdapters:
    """The adapters of a checkpoint."""

    directory: Path
    """The iteration's."""
    peft: Any
    """Adapts a model when called with its chunks."""
    base: str | None
    """Where the weights came from that they adapt: a Megatron checkpoint or a Hugging Face directory."""


def find_saved_adapters(path: str | Path) -> SavedAdapters | None:
    """What a checkpoint says of its adapters; None where it holds a whole model. Nothing in it is executed.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: The adapters are of a kind that isn't known.
    """
    directory = layout.resolve_checkpoint(path)
    run_config = read_run_config(directory)
    if run_config.get("peft") is None:
        return None
    where = f"{directory / layout.CONFIG_FILE}: peft"
    peft = from_yaml_dict(run_config["peft"], where=where)
    if not callable(peft):
        raise ValueError(f"{where} is a {type(peft).__name__}: expected a kind of adapters such as LoRA")
    return SavedAdapters(directory, peft, (run_config.get("checkpoint") or {}).get("pretrained_checkpoint"))


def check_base(saved: SavedAdapters, base: str | Path | None) -> Path:
    """The directory of the weights under the adapters.

    Args:
        saved: From `find_saved_adapters`.
        base: The directory to take in place of the one that was trained on.

    Raises:
        FileNotFoundError: There is nothing.
    """
    path = base or saved.base
    if path is None or not (layout.is_hf_directory(path) or layout.checkpoint_exists(path)):
        raise FileNotFoundError(
            f"{saved.directory} holds adapters of the weights in {path}, which hold neither a Megatron checkpoint nor "
            "a Hugging Face model: name them (--base on the command line)"
        )
    return Path(path)


def load_adapters(chunks: Sequence[MegatronModule], saved: SavedAdapters) -> None:
    """Adapt a bare model and load the adapters' weights. Collective."""
    saved.peft(list(chunks), training=False)
    load_model_weights(chunks, saved.directory, is_wanted=saved.peft.adapter_key_filter)
