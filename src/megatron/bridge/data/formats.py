# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Turns a JSONL line into text and says which characters are learned and which may be cut off."""

import string
from dataclasses import replace
from typing import Any

from megatron.bridge.data.chat import ChatFormat
from megatron.bridge.data.fields import ignored_fields
from megatron.bridge.data.row_notes import Note
from megatron.bridge.data.samples import RenderedSample, SampleFormat, Span, json_type, nothing_to_learn
from megatron.bridge.data.sft_options import SFTOptions
from megatron.bridge.data.tokenizer import Tokenizer

PROMPT_AND_ANSWER = SFTOptions.prompt_template
LACKS_BOS = Note(
    "the tokenizer's BOS is left out",
    "the tokenizer puts it before a text, and so does generate; set dataset.dataset_kwargs.add_bos=true",
)
NO_PROMPT = Note(
    "the prompt is empty",
    "the first token of the answer isn't learned, as none comes before it; name the field that holds the prompt in "
    "dataset.dataset_kwargs.prompt_template, or set dataset.dataset_kwargs.add_bos=true",
)


def choose_format(first_row: dict[str, Any], options: SFTOptions, tokenizer: Tokenizer) -> SampleFormat:
    """Chooses the format of a file by `options.chat`, or by the keys of its first line: conversations, text, or pairs.

    Raises:
        ValueError: The options or the tokenizer don't allow that format.
    """
    chat = options.chat
    if chat is None:
        chat = "messages" in first_row or "conversations" in first_row
    if chat:
        return ChatFormat(options, tokenizer)
    if "text" in first_row and options.label_key not in first_row and options.prompt_template == PROMPT_AND_ANSWER:
        options = replace(options, prompt_template="{text}", label_key="text", truncation_field="")
    return PromptFormat(options, lacks_bos=tokenizer.puts_bos and not options.add_bos)


class PromptFormat:
    """Lines with a prompt and an answer, joined by a template that ends with the answer."""

    def __init__(self, options: SFTOptions, *, lacks_bos: bool = False) -> None:
        """Parses the template.

        Args:
            options: Format of the lines.
            lacks_bos: Whether the tokenizer puts a BOS before a text, and samples are to have none.

        Raises:
            ValueError: The template does not end with the answer's field, or lacks the truncation field.
        """
        self.notes = (LACKS_BOS,) if lacks_bos else ()
        self.adds_bos = options.add_bos
        self.adds_eos = options.add_eos
        self.answer_only_loss = options.answer_only_loss
        self.label_key = options.label_key
        where = f"dataset.dataset_kwargs.prompt_template={options.prompt_template!r}"
        try:
            parsed = list(string.Formatter().parse(options.prompt_template))
        except ValueError as error:
            raise ValueError(f"{where} cannot be parsed ({error}): expected text with {{field}} names") from error
        self.parts = [(literal, name) for literal, name, _, _ in parsed]
        changed = next((name for _, name, specification, conversion in parsed if specification or conversion), None)
        if changed is not None:
            raise ValueError(f"{where} formats {changed!r}: expected its name alone, as {{{changed}}}")
        names = [name for _, name in self.parts]
        self.fields = frozenset(name for name in names if name is not None)
        self.if_ignored = f"{where} doesn't name it: put {{{{key}}}} into it, or take the field out of the data"
        if not names or names[-1] != self.label_key or names.count(self.label_key) != 1:
            raise ValueError(f"{where}: expected it to end with {{{self.label_key}}} (label_key), named once")
        self.truncation_fields = [name.strip() for name in options.truncation_field.split(",") if name.strip()]
        for name in self.truncation_fields:
            if name not in names or name == self.label_key:
                raise ValueError(f"dataset.dataset_kwargs.truncation_field={name!r} is no prompt field of {where}")

    def render(self, row: dict[str, Any]) -> RenderedSample:
        """Joins the fields; the answer's span begins at the space before it, where a tokenizer puts the space."""
        text = ""
        spans: dict[str, Span] = {}
        for literal, name in self.parts:
            text += literal
            if name is None:  # an escaped brace
                continue
            value = self._value(row, name)
            spans[name] = (len(text), len(text) + len(value))
            text += value
        notes = self.notes
        if len(row) > len(self.fields):
            notes = (*notes, *ignored_fields(row, self.fields, self.if_ignored))
        start, end = spans[self.label_key]
        if not text[start:end].strip():
            return nothing_to_learn("a blank answer", notes)
        if start and not self.adds_bos and not text[:start].strip():
            notes = (*notes, NO_PROMPT)
        if text[:start].endswith(" "):
            start -= 1
        learned = (start, end) if self.answer_only_loss else (0, end)
        cuttable = tuple(spans[name] for name in self.truncation_fields)
        return RenderedSample(text, (learned,), cuttable, notes=notes)

    def _value(self, row: dict[str, Any], name: str) -> str:
        if name not in row:
            found = ", ".join(repr(key) for key in row) or "none"
            raise ValueError(f"no field {name!r} (found: {found}): add it or change dataset.dataset_kwargs")
        value = row[name]
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} is {json_type(value)}: expected a string")
        return value.strip(" ")
