# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer's files and `generation_config.json`, which says at which tokens a text ends.

They are copied together from a Hugging Face directory to each checkpoint, and from a checkpoint to an export.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import read_run_config
from megatron.bridge.models.conversion.generation_config import (
    generation_config_of_model,
    learned_end_ids,
    read_generation_config,
    with_end_ids,
    write_generation_config,
)
from megatron.bridge.utils.hf_hub import find_hf_directory

logger = logging.getLogger(__name__)

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files at the top of `source` that match a pattern."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, target / path.name)


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's files are in a directory."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer and its generation settings."""

    tokenizer: Path | None
    """Directory that holds the tokenizer's files; None: there are none."""

    generation: dict[str, Any] | None
    """Content of `generation_config.json`; None: there is none."""

    @classmethod
    def of(
        cls, model: Path | None, *, checkpoint: str | Path | None = None, tokenizer: str | Path | None = None
    ) -> "TokenizerFiles":
        """The files of a checkpoint, or else of a model.

        Args:
            model: Directory of a Hugging Face model; None: there is none.
            checkpoint: As `path` for `of_checkpoint`; None: the model's own are taken.
            tokenizer: Directory, or hub name, of the tokenizer to take in place of either's.

        Raises:
            FileNotFoundError, ValueError: As for `of_checkpoint`.
        """
        if checkpoint is not None:
            found = cls.of_checkpoint(checkpoint, model)
        else:
            found = cls(model, None if model is None else generation_config_of_model(model))
        return found if tokenizer is None else cls(find_hf_directory(tokenizer, with_weights=False), found.generation)

    @classmethod
    def of_checkpoint(cls, path: str | Path, model: Path | None = None) -> "TokenizerFiles":
        """The files of a Megatron checkpoint. What it lacks is taken from its Hugging Face model.

        Checkpoints of other programs have no generation settings. For a trained checkpoint, the end tokens of its
        tokenizer, which were learned, are added to those of the model.

        Args:
            path: Root, or `iter_N` directory.
            model: Directory of the Hugging Face model; None: the one that the checkpoint names, if it is still there.

        Raises:
            FileNotFoundError: No checkpoint there.
            ValueError: A file is damaged.
        """
        directory = iterations.resolve_checkpoint(path)
        own = directory / iterations.TOKENIZER_DIRECTORY
        model = _model_of(directory) if model is None else model
        tokenizer = own if has_tokenizer(own) else model
        if tokenizer is not own:
            logger.info("%s has no tokenizer of its own: that of %s is taken", directory, model)
        generation = read_generation_config(own)
        if generation is None:
            generation = {} if model is None else generation_config_of_model(model)
            is_trained = (directory / iterations.TRAIN_STATE_FILE).exists()
            if (is_trained or model is None) and tokenizer is not None and has_tokenizer(tokenizer):
                generation = with_end_ids(generation, learned_end_ids(_load_tokenizer(tokenizer)))
        return cls(tokenizer, generation)

    def write(self, target: Path) -> None:
        """Write the files into a directory that has none of them."""
        if self.tokenizer is not None:
            copy_files(self.tokenizer, target, TOKENIZER_PATTERNS)
        if self.generation is not None:
            write_generation_config(target, self.generation)


def find_generation_config(place: str | Path | None) -> dict[str, Any] | None:
    """The generation settings of the weights that a run starts from. Nothing is downloaded.

    Args:
        place: A Megatron checkpoint, the directory of a Hugging Face model, or the name of one on the hub.

    Returns:
        None where the place isn't there or says nothing.

    Raises:
        ValueError: The settings are damaged.
    """
    if place is None:
        return None
    if not iterations.checkpoint_exists(Path(place).expanduser()):
        model = _local_model(place)
        return None if model is None else generation_config_of_model(model)
    try:
        directory = iterations.find_checkpoint(place)
    except (FileNotFoundError, ValueError):  # not complete: the load says so where it needs it
        return None
    found = read_generation_config(directory / iterations.TOKENIZER_DIRECTORY)
    model = _model_of(directory) if found is None else None
    return found if model is None else generation_config_of_model(model)


def _model_of(directory: Path) -> Path | None:
    """The directory of the model that an iteration says it came from."""
    if not (directory / iterations.CONFIG_FILE).is_file():
        return None
    section = read_run_config(directory).get("model")
    return _local_model(section.get("hf_model_id") if isinstance(section, dict) else None)


def _local_model(name: str | Path | None) -> Path | None:
    if not name:
        return None
    try:
        directory = find_hf_directory(name, with_weights=False, local_files_only=True)
    except FileNotFoundError:
        return None
    return directory if (directory / "config.json").is_file() else None


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer in {directory} cannot be loaded ({reason}): restore its files") from error
