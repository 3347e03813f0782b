# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows of Hugging Face's `datasets`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.bridge.data.sources import Row, digest_of_files, without_nulls

PROGRESS_FROM_ROWS = 10_000


class ArrowSource:
    """A `datasets.Dataset`, or a list of rows."""

    expected = "rows"

    def __init__(self, dataset: Any, *, where: str, label: str, files: Sequence[Path] = ()) -> None:
        """Keeps an opened dataset.

        Args:
            dataset: The dataset, or a list of rows.
            where: Names it in messages.
            label: See `Source`.
            files: What says all that the rows are. None: the rows themselves do.
        """
        self.where = where
        self.label = label
        self.dataset = _undecoded(dataset)
        self.files = files

    def __str__(self) -> str:
        return self.where

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the rows; Arrow gives every field to every row, so one that is null counts as not there."""
        hidden = None if show_progress and len(self.dataset) >= PROGRESS_FROM_ROWS else True
        for number, row in enumerate(tqdm(self.dataset, desc=f"tokenising {self.label}", disable=hidden), start=1):
            yield number, without_nulls(row)

    def digest(self) -> str:
        """A hash of the files, or of the rows."""
        if self.files:
            return digest_of_files(self.files)
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _undecoded(dataset: Any) -> Any:
    """The dataset with images and sounds as they were saved: no part of a sample takes them."""
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    return dataset
