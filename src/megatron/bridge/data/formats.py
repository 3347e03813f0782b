# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Turns a JSONL line into text and says which characters are learned and which may be cut off."""

import string
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron.bridge.data.sft_options import SFTOptions
from megatron.bridge.data.tokenizer import Tokenizer

Span = tuple[int, int]

PROMPT_AND_ANSWER = SFTOptions.prompt_template

ROLE_OF_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class RenderedSample:
    """A sample as text; spans are [start, end) in characters."""

    text: str
    learned: tuple[Span, ...]
    cuttable: tuple[Span, ...] = ()


class SampleFormat(Protocol):
    """How a JSONL object becomes text."""

    adds_bos: bool
    adds_eos: bool

    def render(self, row: dict[str, Any]) -> RenderedSample | None:
        """Returns the sample, None if it holds nothing to learn; ValueError if `row` has not this format."""


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
    return PromptFormat(options)


class PromptFormat:
    """Lines with a prompt and an answer, joined by a template that ends with the answer."""

    def __init__(self, options: SFTOptions) -> None:
        """Parses the template.

        Raises:
            ValueError: The template does not end with the answer's field, or lacks the truncation field.
        """
        self.adds_bos = options.add_bos
        self.adds_eos = options.add_eos
        self.answer_only_loss = options.answer_only_loss
        self.label_key = options.label_key
        where = f"dataset.dataset_kwargs.prompt_template={options.prompt_template!r}"
        try:
            self.parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(options.prompt_template)]
        except ValueError as error:
            raise ValueError(f"{where} cannot be parsed ({error}): expected text with {{field}} names") from error
        names = [name for _, name in self.parts]
        if not names or names[-1] != self.label_key or names.count(self.label_key) != 1:
            raise ValueError(f"{where}: expected it to end with {{{self.label_key}}} (label_key), named once")
        self.truncation_fields = [name.strip() for name in options.truncation_field.split(",") if name.strip()]
        for name in self.truncation_fields:
            if name not in names or name == self.label_key:
                raise ValueError(f"dataset.dataset_kwargs.truncation_field={name!r} is no prompt field of {where}")

    def render(self, row: dict[str, Any]) -> RenderedSample | None:
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
        start, end = spans[self.label_key]
        if not text[start:end].strip():
            return None
        if text[:start].endswith(" "):
            start -= 1
        learned = (start, end) if self.answer_only_loss else (0, end)
        return RenderedSample(text, (learned,), tuple(spans[name] for name in self.truncation_fields))

    def _value(self, row: dict[str, Any], name: str) -> str:
        if name not in row:
            found = ", ".join(repr(key) for key in row) or "none"
            raise ValueError(f"no field {name!r} (found: {found}): add it or change dataset.dataset_kwargs")
        value = row[name]
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} is {_json_type(value)}: expected a string")
        return value.strip(" ")


class ChatFormat:
    """Conversations, rendered by the tokenizer's chat template; the assistant's turns are learned."""

    adds_bos = False
    adds_eos = False

    def __init__(self, options: SFTOptions, tokenizer: Tokenizer) -> None:
        """Keeps the tokenizer.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not tokenizer.has_chat_template:
            raise ValueError(f"tokenizer {tokenizer.name} has no chat template: set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.answer_only_loss = options.answer_only_loss

    def render(self, row: dict[str, Any]) -> RenderedSample | None:
        """Renders the conversation; a learned span runs from the generation prompt to the end of the turn."""
        messages, tools = read_messages(row), row.get("tools")
        if not any(message["role"] == "assistant" for message in messages):
            return None
        text = self._render(messages, tools)
        if not self.answer_only_loss:
            return RenderedSample(text, ((0, len(text)),))
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise ValueError("the conversation begins with the assistant: expected a user or system message first")
            before = self._render(messages[:turn], tools, add_generation_prompt=True)
            until = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)
            if not (until.startswith(before) and text.startswith(until)):
                raise ValueError(
                    f"the chat template cannot be split into turns: message {turn + 1} does not follow its generation "
                    "prompt unchanged; set another tokenizer.chat_template, or answer_only_loss=false"
                )
            spans.append((len(before), len(until)))
        return RenderedSample(text, tuple(spans))

    def _render(self, messages: list[dict], tools: list | None, *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tools=tools)


def read_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the conversation of a line with `messages` (role, content) or `conversations` (from, value).

    Raises:
        ValueError: The line has neither, or a message is not complete.
    """
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        found = ", ".join(repr(name) for name in row) or "none"
        raise ValueError(f"no field 'messages' or 'conversations' (found: {found})")
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"field {key!r} is {_json_type(entries)}: expected a list with at least one message")
    read_entry = _read_message if key == "messages" else _read_utterance
    messages = [read_entry(entry, f"{key}[{index}]") for index, entry in enumerate(entries)]
    system = row.get("system")
    if key == "conversations" and system:
        if not isinstance(system, str):
            raise ValueError(f"field 'system' is {_json_type(system)}: expected a string")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _read_message(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_json_type(entry)}: expected an object with 'role' and 'content'")
    if not isinstance(entry.get("role"), str):
        raise ValueError(f"{where} has role {entry.get('role')!r}: expected a string such as 'user'")
    if not isinstance(entry.get("content"), str) and not entry.get("tool_calls"):
        found = _json_type(entry["content"]) if "content" in entry else "missing"
        raise ValueError(f"{where}.content is {found}: expected a string")
    return entry


def _read_utterance(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_json_type(entry)}: expected an object with 'from' and 'value'")
    speaker, value = entry.get("from"), entry.get("value")
    role = ROLE_OF_SPEAKER.get(speaker.casefold()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where} is from {speaker!r}: expected one of {', '.join(ROLE_OF_SPEAKER)}")
    if not isinstance(value, str):
        found = _json_type(value) if "value" in entry else "missing"
        raise ValueError(f"{where}.value is {found}: expected a string")
    return {"role": role, "content": value}


def _json_type(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
