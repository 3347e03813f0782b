# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that holds adapters only: what they are, what they stand beside, and how they come into a model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from megatron.core.transformer.module import MegatronModule

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import load_model_weights, read_run_config
from megatron.bridge.utils.hf_hub import find_hf_directory, is_hub_name
from megatron.bridge.utils.yaml_io import from_yaml_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedAdapters:
    """The adapters of a checkpoint."""

    directory: Path
    """The iteration's."""
    peft: Any
    """Adapts a model when called with its chunks."""
    base: str | None
    """Where the weights came from that they adapt: a Megatron checkpoint or a Hugging Face directory."""
    hf_model_id: str | None
    """The Hugging Face model that all of it came from."""


def find_saved_adapters(path: str | Path) -> SavedAdapters | None:
    """The adapters of a checkpoint, as it describes them; None if it holds a whole model. Nothing in it is executed.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: The adapters are of a kind that isn't known.
    """
    directory = iterations.resolve_checkpoint(path)
    run_config = read_run_config(directory)
    if run_config.get("peft") is None:
        return None
    where = f"{directory / iterations.CONFIG_FILE}: peft"
    peft = from_yaml_dict(run_config["peft"], where=where)
    if not callable(peft):
        raise ValueError(f"{where} is a {type(peft).__name__}: expected a kind of adapters such as LoRA")
    base = (run_config.get("checkpoint") or {}).get("pretrained_checkpoint")
    return SavedAdapters(directory, peft, base, (run_config.get("model") or {}).get("hf_model_id"))


def check_base(saved: SavedAdapters, base: str | Path | None, *, model: str | Path | None) -> Path:
    """The directory of the weights under the adapters.

    Args:
        saved: From `find_saved_adapters`.
        base: The directory or hub name to take in place of the one that was trained on.
        model: Where the Hugging Face model is now, which may have been what was trained on: a directory or hub name.

    Raises:
        FileNotFoundError: There is nothing.
    """
    path = base or saved.base
    if base is None and model is not None and not _holds_weights(path) and _is_the_model(saved):
        logger.info("the weights under the adapters: %s; they were trained on %s", model, path)
        path = model
    if path is not None and is_hub_name(path):
        return find_hf_directory(path)
    if not _holds_weights(path):
        raise FileNotFoundError(
            f"{saved.directory} holds adapters of the weights in {path}, which hold neither a Megatron checkpoint nor "
            "a Hugging Face model: name them (--base on the command line)"
        )
    return Path(path).expanduser()


def _holds_weights(path: str | Path | None) -> TypeGuard[str | Path]:
    found = None if path is None else Path(path).expanduser()
    return found is not None and (iterations.is_hf_directory(found) or iterations.checkpoint_exists(found))


def _is_the_model(saved: SavedAdapters) -> bool:
    """Whether the adapters were trained on the Hugging Face directory itself; runs name it by a relative path, too."""
    if saved.base is None or saved.hf_model_id is None:
        return False
    parts, named = Path(saved.base).expanduser().parts, Path(saved.hf_model_id).parts
    return named[-len(parts) :] == parts


def load_adapters(chunks: Sequence[MegatronModule], saved: SavedAdapters) -> None:
    """Adapt a bare model and load the adapters' weights. Collective."""
    saved.peft(list(chunks), training=False)
    load_model_weights(chunks, saved.directory, is_wanted=saved.peft.adapter_key_filter)
