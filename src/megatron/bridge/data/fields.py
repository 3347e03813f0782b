# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Fields of rows and keys of messages that aren't part of a sample's text, and the notes on those that are lost."""

from collections.abc import Collection
from typing import Any

from megatron.bridge.data.row_notes import Note

FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "loss_scale")
"""Keys of a message by which its author says whether it is learned."""

ABOUT_THE_ROW = frozenset(
    "id _id idx index uid uuid row_id source src dataset dataset_name origin url link file filename path license "
    "author category categories topic topics tag tags split task task_name task_type type kind lang language "
    "languages locale domain subset version date created created_at timestamp time hash sha model model_name "
    "generator metadata meta info score scores rating quality difficulty length num_turns turns num_tokens "
    "tool_call_id original_answers".split()
)
"""Names of metadata of a row or message. They are counted in the report, without a warning."""

MOST_WORDS_OF_A_NAME = 4
"""A longer text is content, whatever its field is called: a `task` may be the instruction."""

ANSWERS = ("label", "labels", "answer", "answers", "output", "outputs", "target", "response", "completion")
"""Names of answers, as text or as the number of a class."""


def ignored_fields(row: dict[str, Any], used: Collection[str], advice: str) -> tuple[Note, ...]:
    """Notes on the fields of a row that aren't used in a sample.

    A field with text, a list or an object gets a warning, unless its name is that of metadata and it is short.

    Args:
        row: A JSONL object.
        used: The fields that are taken.
        advice: What to do about a field, with {key} for its name.
    """
    return tuple(
        Note(f"field {key!r} is ignored", advice.replace("{key}", key) if _may_be_text(key, value) else "")
        for key, value in row.items()
        if key not in used and not is_empty(value)
    )


def is_empty(value: Any) -> bool:
    """Whether a field or key holds nothing: null, or an empty text, list or object."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def _may_be_text(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return key in FLAGS or key.casefold() in ANSWERS
    if isinstance(value, str) and len(value.split()) > MOST_WORDS_OF_A_NAME:
        return True
    return key.casefold() not in ABOUT_THE_ROW
