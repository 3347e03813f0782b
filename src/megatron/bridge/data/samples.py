# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A sample as text: what every format makes of a row."""

from dataclasses import dataclass
from typing import Any, Protocol

from megatron.bridge.data.row_notes import Note

Span = tuple[int, int]
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class RenderedSample:
    """A sample as text; spans are [start, end) in characters, in order and apart."""

    text: str
    learned: tuple[Span, ...]

    cuttable: tuple[Span, ...] = ()
    """What may be cut off."""

    tokens: tuple[list[int], Offsets] | None = None
    """Ids and offsets, where the template's marks came with them. None: `text` is still to be tokenised."""

    has_exact_spans: bool = False
    """Whether `learned` is what was marked, to be taken as it is, line breaks behind an end token included."""

    should_end: bool = False
    """Whether each learned span should end in a special token, at which generation stops."""

    notes: tuple[Note, ...] = ()
    """What of the row is ignored or lost."""

    dropped: str = ""
    """Why there is nothing to learn; the row is left out then."""


class SampleFormat(Protocol):
    """How a JSONL object becomes text."""

    adds_bos: bool
    adds_eos: bool

    def render(self, row: dict[str, Any]) -> RenderedSample:
        """Returns the sample; ValueError if `row` has not this format."""


def nothing_to_learn(reason: str, notes: tuple[Note, ...] = ()) -> RenderedSample:
    """A row that is left out, and why."""
    return RenderedSample("", (), notes=notes, dropped=reason)


def json_type(value: Any) -> str:
    """What JSON calls a value, for errors."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
