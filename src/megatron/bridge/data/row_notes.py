# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Notes on what is ignored or lost of a row. They are counted by file, and shown in its report and as warnings."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SHOWN_IN_REPORT = 8


@dataclass(frozen=True)
class Note:
    """Something that happens to a row and that its author may not expect. Equal notes of a file are counted."""

    what: str
    """What happens, without the row's own values: "field 'instruction' is ignored"."""

    advice: str = ""
    """The reason, and what to do. A note with advice is a warning. Without, it is only in the report."""


@dataclass(frozen=True)
class NoteCount:
    """How many rows a note is about, and the number of the first."""

    what: str
    advice: str
    rows: int
    first: int

    def __str__(self) -> str:
        return f"{self.what} in {self.rows} (the first in line {self.first})"

    @property
    def warning(self) -> str:
        """The line for the log."""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.what} in {rows} (the first in line {self.first}): {self.advice}"


class NoteCounter:
    """Counts the notes of a file's rows."""

    def __init__(self) -> None:
        """Begins with none."""
        self._found: dict[Note, list[int]] = {}

    def add(self, number: int, notes: Iterable[Note]) -> None:
        """Counts the notes of row `number`; a note counts once a row."""
        for note in dict.fromkeys(notes):
            self._found.setdefault(note, [0, number])[0] += 1

    def counts(self) -> tuple[NoteCount, ...]:
        """The notes with their counts: warnings first, then by the number of rows."""
        counts = [NoteCount(note.what, note.advice, *found) for note, found in self._found.items()]
        return tuple(sorted(counts, key=lambda count: (not count.advice, -count.rows, count.first)))


def read_counts(stored: Iterable[dict[str, Any]]) -> tuple[NoteCount, ...]:
    """Returns what was kept of counts as plain data."""
    return tuple(NoteCount(**count) for count in stored)


def shown(counts: tuple[NoteCount, ...]) -> str:
    """The counts for the report's line."""
    more = len(counts) - SHOWN_IN_REPORT
    return "; ".join([*map(str, counts[:SHOWN_IN_REPORT]), *([f"{more} more of the kind"] if more > 0 else [])])
