# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Cache tokenised data on disk, so that a restarted run doesn't tokenise again.

There is one file for each source and way to tokenise it. It is used only if it was made from the same content with the
same tokenizer, template, options and format. Damaged, foreign and outdated files are written again. The file is an .npz
of plain arrays: nothing in it can be executed, and reading it verifies its checksums.
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
"""Increase it when the same data would be tokenised differently, or the content of the file changes."""


def cache_file(directory: str | Path, label: str, recipe: dict[str, Any]) -> Path:
    """Returns the cache file of a source.

    Args:
        directory: The cache directory.
        label: The source's short name.
        recipe: All that the tokens depend on besides the content, as plain data.
    """
    digest = hashlib.sha256(_as_text(recipe).encode()).hexdigest()
    return Path(directory) / f"{label}-{digest[:16]}.npz"


def write_cache(path: Path, arrays: dict[str, np.ndarray], *, recipe: dict[str, Any], report: dict[str, Any]) -> bool:
    """Writes a cache file atomically.

    Args:
        path: From `cache_file`.
        arrays: The arrays to keep.
        recipe: What must match for the file to be used, including a hash of the content.
        report: The report to keep with the arrays.

    Returns:
        Whether it could be written. If not, a warning says why.
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


def read_cache(
    path: Path, names: tuple[str, ...], *, recipe: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict] | None:
    """Returns the arrays and the report of a cache file; None if there is no valid one.

    Args:
        path: From `cache_file`.
        names: Names of the arrays.
        recipe: As for `write_cache`.
    """
    try:
        check_archive(path, sums=False)  # NumPy verifies the checksums of what it reads
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
