# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where rows come from: JSON Lines files here, Hugging Face's `datasets` in the modules beside."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron.bridge.data.jsonl import read_rows

Row = tuple[int, dict[str, Any]]
"""A row's number, from 1, and its object."""


class Source(Protocol):
    """A file's worth of rows; `str()` names it in messages."""

    label: str
    """A short name, the same wherever the data lies."""

    expected: str
    """What is missing in an empty one."""

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the rows; raises ValueError or FileNotFoundError naming what can't be read."""

    def digest(self) -> str:
        """A hash of the content."""


class JsonlSource:
    """A JSON Lines file; a row's number is its line."""

    expected = "one JSON object a line"

    def __init__(self, path: str | Path) -> None:
        """Keeps the path; nothing is read yet."""
        self.path = Path(path)
        self.label = self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the lines that are not blank."""
        return read_rows(self.path, show_progress=show_progress)

    def digest(self) -> str:
        """A hash of the file."""
        return digest_of_files([self.path])


def without_nulls(value: Any) -> Any:
    """`value` without the entries of objects that are null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def digest_of_files(paths: Iterable[Path]) -> str:
    """A hash of the files' content, in their order; raises FileNotFoundError or ValueError naming one."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist: expected the training data") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): expected a readable file") from error
    return digest.hexdigest()
