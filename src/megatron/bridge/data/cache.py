# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tokenised data kept on disk, so that a run that starts again tokenises nothing.

One file for a source and a way to tokenise it. It is believed only if it was made from the same content with the same
tokenizer, template, options and format; torn, foreign and outdated ones are made again. An .npz of plain arrays: nothing
in it can run, and reading it checks its checksums.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megatron.bridge.utils.expansion_limits import check_archive
from megatron.bridge.utils.files import atomic_write

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""To be raised when the same data would be tokenised otherwise than before, or the file's layout changes."""


def cache_file(directory: str | Path, label: str, recipe: dict[str, Any]) -> Path:
    """Returns the file for a source tokenised in one way.

    Args:
        directory: Where such files lie.
        label: The source's short name.
        recipe: Everything but the content that the tokens depend on, as plain data.
    """
    digest = hashlib.sha256(_as_text(recipe).encode()).hexdigest()
    return Path(directory) / f"{label}-{digest[:16]}.npz"


def write_cache(path: Path, arrays: dict[str, np.ndarray], *, recipe: dict[str, Any], report: dict[str, Any]) -> bool:
    """Writes a cache file beside its name and gives it the name when it is complete.

    Args:
        path: From `cache_file`.
        arrays: What to keep.
        recipe: What must be the same for the file to be believed, the content's hash included.
        report: Figures to keep with it.

    Returns:
        Whether it could be written; the log says why not.
    """
    about = {"version": FORMAT_VERSION, "recipe": recipe, "report": report}
    content: dict[str, Any] = {"about": np.array(_as_text(about)), **arrays}
    try:
        with atomic_write(path, "wb") as stream:
            np.savez(stream, **content)
    except OSError as error:
        logger.warning("%s can't be written (%s): the tokens are not kept; see dataset.path_to_cache", path, error)
        return False
    return True


def read_cache(path: Path, names: tuple[str, ...], *, recipe: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict] | None:
    """Returns the arrays and the report of a cache file; None if there is none that can be believed.

    Args:
        path: From `cache_file`.
        names: The arrays.
        recipe: As when it was written.
    """
    try:
        check_archive(path, sums=False)  # what is read of it is compared as it is read
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            if about["version"] != FORMAT_VERSION or _as_text(about["recipe"]) != _as_text(recipe):
                logger.info("%s was made from other data or in another way: tokenising again", path)
                return None
            return {name: stored[name] for name in names}, about["report"]
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes make the readers of archives, arrays and JSON raise whatever they do
        logger.warning("%s can't be read (%s): tokenising again", path, " ".join(str(error).split()))
        return None


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
