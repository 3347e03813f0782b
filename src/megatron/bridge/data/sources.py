# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where rows come from: JSON Lines files, and directories that Hugging Face's `datasets` saved."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron.bridge.data.jsonl import read_rows

Row = tuple[int, dict[str, Any]]
"""A row's number, from 1, and its object."""

PROGRESS_FROM_ROWS = 10_000


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
        return _digest([self.path])


class ArrowSource:
    """One split of a directory that `save_to_disk` wrote."""

    expected = "rows"

    def __init__(self, directory: Path, split: str | None, dataset: Any) -> None:
        """Keeps an opened `datasets.Dataset`; `split` None where the directory holds one alone."""
        self.directory = directory if split is None else directory / split
        self.label = split or directory.name
        self.dataset = dataset

    def __str__(self) -> str:
        return str(self.directory)

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the rows; Arrow gives every field to every row, so one that is null counts as not there."""
        hidden = None if show_progress and len(self.dataset) >= PROGRESS_FROM_ROWS else True
        for number, row in enumerate(tqdm(self.dataset, desc=f"tokenising {self.label}", disable=hidden), start=1):
            yield number, without_nulls(row)

    def digest(self) -> str:
        """A hash of the Arrow files and of the one that says which of their rows count."""
        return _digest([*sorted(self.directory.glob("*.arrow")), self.directory / "state.json"])


def open_hf_dataset(directory: str | Path) -> dict[str | None, ArrowSource]:
    """Opens a directory that `save_to_disk` wrote.

    Returns:
        Its splits by name; one under None where it holds a single dataset.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It holds something else, or the `datasets` library is not installed.
    """
    where = f"dataset.hf_dataset={str(directory)!r}"
    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"{where} is no directory: expected one that datasets' save_to_disk wrote; data is not fetched from a hub"
        )
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise ValueError(
            f"{where} needs the datasets library, which can't be imported ({error}): pip install "
            "'megatron-bridge[datasets]', or write JSONL files and set dataset.dataset_root"
        ) from error
    try:
        found = load_from_disk(str(directory))
    except (OSError, ValueError, LookupError, TypeError) as error:  # the library's IndexError: it holds no row
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} can't be opened ({reason}): expected what datasets' save_to_disk wrote") from error
    splits = {None: found} if isinstance(found, Dataset) else dict(found)
    return {split: ArrowSource(Path(directory), split, _undecoded(dataset)) for split, dataset in splits.items()}


def _undecoded(dataset: Any) -> Any:
    """The dataset with images and sounds as they were saved: no part of a sample takes them."""
    for name, feature in dataset.features.items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    return dataset


def without_nulls(value: Any) -> Any:
    """`value` without the entries of objects that are null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _digest(paths: list[Path]) -> str:
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
