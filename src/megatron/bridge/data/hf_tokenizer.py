# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Load transformers' tokenizer of a directory, or of a model on the hub."""

import json
import logging
from pathlib import Path
from typing import Any

from megatron.bridge.utils.hf_hub import find_hf_directory

logger = logging.getLogger(__name__)

DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Of `hf_tokenizer_kwargs`, those that say what to fetch from the hub."""


def load_hf_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """Transformers' tokenizer of a directory or hub name. No code of the directory is run.

    Args:
        name: As `tokenizer.tokenizer_model`.
        options: As `tokenizer.hf_tokenizer_kwargs`; those for the hub and `trust_remote_code` are taken out.

    Raises:
        FileNotFoundError: No such directory, and no such model that can be fetched.
        ValueError: The files can't be loaded, or need code of their own.
    """
    from transformers import AutoTokenizer

    where = f"tokenizer.tokenizer_model={name!r}"
    download = {option: options.pop(option) for option in DOWNLOAD_OPTIONS if options.get(option) is not None}
    is_trusted = bool(options.pop("trust_remote_code", None))
    try:
        directory = find_hf_directory(name, with_weights=False, **download)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"tokenizer.tokenizer_model={error}") from error
    code = code_of_tokenizer(directory)
    try:
        found = AutoTokenizer.from_pretrained(directory, **options, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = " ".join(str(error).split())
        expected = "a directory with tokenizer.json"
        if code is not None and "trust_remote_code" in reason:
            reason = f"it needs code of its own, {code!r}, which is never run, trusted or not"
            expected = "one of transformers' own classes with a tokenizer.json"
        raise ValueError(f"{where} cannot be loaded ({reason}): expected {expected}") from error
    if is_trusted and code is not None:
        kind = type(found).__name__
        logger.warning("%s has code of its own, %r, which is never run: a %s is taken", where, code, kind)
    return found


def code_of_tokenizer(directory: Path) -> str | None:
    """The class of its own that a tokenizer's directory names (`auto_map`); None: transformers' own will do."""
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = content["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    classes = [text for text in (named if isinstance(named, list) else [named]) if isinstance(text, str)]
    return classes[-1] if classes else None
