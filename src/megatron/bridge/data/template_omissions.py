# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Find what a chat template omits from a conversation, by comparing renderings."""

import json
from collections.abc import Iterator
from typing import Any

from megatron.bridge.data.answers import Rendering
from megatron.bridge.data.fields import ABOUT_THE_ROW, FLAGS, is_empty
from megatron.bridge.data.row_notes import Note

CALLS = ("tool_calls", "function_call")
OF_EACH_MESSAGE = (*CALLS, "reasoning_content", "reasoning", "thinking")
"""Keys that a template may write in some turns and leave out in others."""

ADVICE = "set a tokenizer.chat_template that writes it, or take it out of the data"


def find_omissions(rendering: Rendering) -> Iterator[Note]:
    """Yields a note for each input that the text doesn't depend on: keys of messages, tools, text of messages.

    Raises:
        ValueError: The template omits everything in a turn of the assistant.
    """
    if rendering.tools and _is_same_without(rendering, rendering.messages, tools=None):
        yield Note("'tools' are left out by the chat template", ADVICE)
    keys = [key for message in rendering.messages if len(message) > 2 for key in message]
    for key in dict.fromkeys(keys):
        if key not in ("role", "content", *FLAGS):
            yield from _key(rendering, key)
    yield from _texts(rendering)


def _key(rendering: Rendering, key: str) -> Iterator[Note]:
    messages = rendering.messages
    places = [place for place, message in enumerate(messages) if not is_empty(message.get(key))]
    if not places:
        return
    groups = [[place] for place in places] if key in OF_EACH_MESSAGE else [places]
    for group in groups:
        bare = [_without(message, key) if place in group else message for place, message in enumerate(messages)]
        if not _is_same_without(rendering, bare, tools=rendering.tools):
            continue
        if key in CALLS and is_empty(messages[group[0]].get("content")) and len(group) == 1:
            raise ValueError(
                f"messages[{group[0]}] has {key} and no content, and the chat template doesn't write {key}: an empty "
                "turn would be learned; set a tokenizer.chat_template that writes them, or take the row out"
            )
        yield Note(f"{key!r} of messages is left out by the chat template", "" if key in ABOUT_THE_ROW else ADVICE)


def _is_same_without(rendering: Rendering, messages: list[dict[str, Any]], *, tools: list | None) -> bool:
    try:
        return rendering.tokenizer.apply_chat_template(messages, tools=tools) == rendering.text
    except ValueError:  # the template needs it
        return False


def _without(message: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _texts(rendering: Rendering) -> Iterator[Note]:
    """Notes on text of messages that isn't in the rendering, mostly thoughts of earlier turns."""
    text, place = rendering.text, 0
    for message in rendering.messages:
        content = message.get("content")
        if not content:
            continue
        content = content.strip()
        found = text.find(content, place)
        if found >= 0:
            place = found + len(content)
        elif content not in text and not all(_is_in(line.strip(), text) for line in content.splitlines()):
            role = message["role"]
            yield Note(f"text of {role!r} messages is changed or left out by the chat template", ADVICE)


def _is_in(line: str, text: str) -> bool:
    return line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text or json.dumps(line)[1:-1] in text
