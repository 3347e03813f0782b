# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows whose columns get their usual names, wherever the rows are from."""

import hashlib
from collections.abc import Iterator

from megatron.bridge.data.preprocessing_config import ChatSFTPreprocessingConfig
from megatron.bridge.data.sources import Row, Source


class RenamedSource:
    """Another source with the columns that `ChatSFTPreprocessingConfig` names as `messages` and `tools`."""

    def __init__(self, source: Source, columns: ChatSFTPreprocessingConfig) -> None:
        """Keeps both."""
        self.source, self.columns = source, columns
        self.label, self.expected = source.label, source.expected

    def __str__(self) -> str:
        return str(self.source)

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the rows; raises ValueError naming one without the column of the messages."""
        for number, row in self.source.rows(show_progress=show_progress):
            try:
                renamed = self.columns.renamed(row)
            except ValueError as error:
                raise ValueError(f"{self}:{number}: {error}") from error
            yield number, renamed

    def digest(self) -> str:
        """A hash of the content and of the columns that are taken."""
        columns = self.columns.messages_column, self.columns.tools_column
        return hashlib.sha256(f"{self.source.digest()} {columns}".encode()).hexdigest()
