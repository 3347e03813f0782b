# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read a row of `messages` or `conversations` as a conversation, with notes on what is ignored."""

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.data.fields import ABOUT_THE_ROW, FLAGS, ignored_fields, is_empty
from megatron.bridge.data.jsonl import read_json
from megatron.bridge.data.row_notes import Note
from megatron.bridge.data.samples import json_type

ROLE_OF_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}

OTHER_ROLES = frozenset(("developer", "function", "ipython", "environment", "observation", "context", "documents"))
"""Roles that some chat templates know and that are never the model's."""

FIELDS = ("messages", "conversations", "system", "tools", "chat_template_kwargs")
IGNORED = (
    "a conversation is read from 'messages' (or 'conversations'), 'system' and 'tools': put the text of '{key}' into a "
    "message, or take the field out"
)


EMPTY_ANSWER = Note(
    "an answer is empty", "the model learns to say nothing; take the turn out, or mark it as context with weight=0"
)


@dataclass(frozen=True)
class Conversation:
    """The conversation in a row."""

    messages: list[dict[str, Any]]
    """As transformers takes them; the arguments of tool calls are objects."""

    tools: list[dict[str, Any]] | None

    answers: tuple[int, ...]
    """Which messages are learned, by number from 0."""

    unlearned: tuple[int, ...]
    """Which messages of the assistant are marked as not to be learned."""

    notes: tuple[Note, ...] = ()

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given beside messages and tools."""

    messages_as_written: list[dict[str, Any]] | None = None
    """The messages with arguments as the text that the row holds. None: it holds none."""

    @property
    def roles(self) -> str:
        """The roles that are there, for people."""
        return ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in self.messages))


def read_conversation(row: dict[str, Any]) -> Conversation:
    """Reads a line with `messages` (role, content) or `conversations` (from, value), `system` and `tools`.

    Raises:
        ValueError: The line has neither, or a part of it can't be understood.
    """
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        found = ", ".join(repr(name) for name in row) or "none"
        raise ValueError(f"no field 'messages' or 'conversations' (found: {found})")
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"field {key!r} is {json_type(entries)}: expected a list with at least one message")
    notes = list(ignored_fields(row, (key, *FIELDS[2:]), IGNORED))
    read_entry = _read_message if key == "messages" else _read_utterance
    written = [read_entry(entry, f"{key}[{index}]", notes) for index, entry in enumerate(entries)]
    learned = [_is_learned(message, f"{key}[{index}]", notes) for index, message in enumerate(written)]
    messages = [_with_objects(message, f"{key}[{index}]") for index, message in enumerate(written)]
    has_text_arguments = any(ours is not theirs for ours, theirs in zip(messages, written, strict=True))
    system = _system(row, messages, key)
    of_assistant = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [place for place in of_assistant if learned[place]]
    if any(_says_nothing(messages[place]) for place in answers):
        notes.append(EMPTY_ANSWER)
    before = len(system)
    return Conversation(
        messages=[*system, *messages],
        tools=read_tools(row),
        template_kwargs=read_template_kwargs(row),
        answers=tuple(place + before for place in answers),
        unlearned=tuple(place + before for place in of_assistant if not learned[place]),
        notes=tuple(notes),
        messages_as_written=[*system, *written] if has_text_arguments else None,
    )


def _system(row: dict[str, Any], messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The message that a system prompt in a field of its own becomes; none where there is no such field."""
    system = row.get("system")
    if is_empty(system):
        return []
    if not isinstance(system, str):
        raise ValueError(f"field 'system' is {json_type(system)}: expected a string")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}]
    if messages[0]["content"].strip() != system.strip():
        raise ValueError(f"field 'system' and {key}[0] hold two system prompts: keep one, or join them in {key}[0]")
    return []


def read_template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template beside messages and tools, an object or its JSON text.

    Raises:
        ValueError: It is no object, or names what has a field of its own.
    """
    said = _parsed(row.get("chat_template_kwargs"), "field 'chat_template_kwargs'")
    if is_empty(said):
        return {}
    if not isinstance(said, dict):
        raise ValueError(f"field 'chat_template_kwargs' is {json_type(said)}: expected an object")
    for name in ("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "return_dict"):
        if name in said:
            raise ValueError(f"field 'chat_template_kwargs' has {name!r}: expected arguments of the template alone")
    return said


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row, of which each, or all of them, may be JSON text.

    Raises:
        ValueError: They are something else.
    """
    tools = _parsed(row.get("tools"), "field 'tools'")
    if is_empty(tools):
        return None
    if not isinstance(tools, list):
        raise ValueError(f"field 'tools' is {json_type(tools)}: expected a list of tools, or such a list as JSON text")
    tools = [_parsed(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(
                f"tools[{index}] is {json_type(tool)}: expected an object such as a function's JSON schema"
            )
    return tools


def _parsed(value: Any, where: str) -> Any:
    """`value`, or what it says where it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return read_json(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is a string that is no JSON ({error}): expected JSON") from error


def _read_message(entry: Any, where: str, notes: list[Note]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {json_type(entry)}: expected an object with 'role' and 'content'")
    role = entry.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where} has role {role!r}: expected a string such as 'user'")
    content = entry.get("content")
    is_call = role.strip().casefold() in ("assistant", "model", "gpt") and _calls_something(entry)
    if not isinstance(content, str) and not (content is None and is_call):
        found = json_type(content) if "content" in entry else "missing"
        raise ValueError(f"{where}.content is {found}: expected a string")
    if role in ("user", "assistant", "system", "tool"):
        return entry
    meant = ROLE_OF_SPEAKER.get(role.strip().casefold())
    if meant is not None:
        notes.append(Note(f"role {role!r} is read as {meant!r}"))
        return {**entry, "role": meant}
    if role not in OTHER_ROLES:
        advice = "it is rendered as the chat template does, and never learned; name it 'assistant' if the model speaks"
        notes.append(Note(f"role {role!r} is not known", advice))
    return entry


def _read_utterance(entry: Any, where: str, _: list[Note]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {json_type(entry)}: expected an object with 'from' and 'value'")
    speaker, value = entry.get("from"), entry.get("value")
    role = ROLE_OF_SPEAKER.get(speaker.strip().casefold()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where} is from {speaker!r}: expected one of {', '.join(ROLE_OF_SPEAKER)}")
    if not isinstance(value, str) and not (value is None and role == "assistant" and _calls_something(entry)):
        found = json_type(value) if "value" in entry else "missing"
        raise ValueError(f"{where}.value is {found}: expected a string")
    for other in ("role", "content"):
        if not is_empty(entry.get(other)):
            raise ValueError(f"{where} has {other!r} beside 'from' and 'value': keep one spelling of a message")
    more = {key: more for key, more in entry.items() if key not in ("from", "value")} if len(entry) > 2 else {}
    return {**more, "role": role, "content": "" if value is None else value}


def _says_nothing(message: dict[str, Any]) -> bool:
    return is_empty(message.get("content")) and all(
        is_empty(value) for key, value in message.items() if key not in ("role", *FLAGS, *ABOUT_THE_ROW)
    )


def _calls_something(entry: dict[str, Any]) -> bool:
    return bool(entry.get("tool_calls") or entry.get("function_call"))


def _is_learned(message: dict[str, Any], where: str, notes: list[Note]) -> bool:
    """Whether a message of the assistant is learned: yes, unless a flag says no."""
    if len(message) == 2:
        return True
    flags = {key: message[key] for key in FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{where}.{key} is {value!r}: expected 0 or 1, or true or false; a part can't be weighed")
    if len({bool(value) for value in flags.values()}) > 1:
        said = ", ".join(f"{key}={value!r}" for key, value in flags.items())
        raise ValueError(f"{where} is to be learned and not to be learned ({said}): keep one")
    if message["role"] != "assistant" and any(flags.values()):
        [key, *_] = flags
        role = message["role"]
        advice = f"only turns of the assistant are learned; take {key!r} out, or use answer_only_loss=false"
        notes.append(Note(f"{key!r} on a message of {role!r} is ignored", advice))
    return all(flags.values())


def _with_objects(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with the arguments of its tool calls as objects; itself where they are."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    read = _parsed(calls, f"{where}.tool_calls")
    if not isinstance(read, list) or not all(isinstance(call, dict) for call in read):
        raise ValueError(f"{where}.tool_calls is {json_type(calls)}: expected a list of objects")
    changed = [_call_with_object(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(read)]
    if read is calls and all(ours is theirs for ours, theirs in zip(changed, read, strict=True)):
        return message
    return {**message, "tool_calls": changed}


def _call_with_object(call: dict[str, Any], where: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        changed = _call_with_object(inner, f"{where}.function")
        return call if changed is inner else {**call, "function": changed}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    read = _parsed(arguments, f"{where}.arguments") if arguments.strip() else {}
    if not isinstance(read, dict):
        raise ValueError(f"{where}.arguments is JSON text of {json_type(read)}: expected an object")
    return {**call, "arguments": read}
