# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Find the answers of a conversation in the text that the chat template renders.

A template with `{% generation %}` marks them itself. For other templates, the rendering of the first messages shows
where the next turn starts and ends, provided that it doesn't change when more messages follow. Where it does (Qwen3
removes the thoughts of earlier turns), an answer is the part of the whole rendering that changes with its text.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.bridge.data.samples import Span
from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, Tokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendering:
    """A conversation and its rendered text."""

    tokenizer: HuggingFaceTokenizer
    messages: Messages
    tools: list[dict[str, Any]] | None
    text: str

    unasked: str = ""
    """The generation prompt, if the template writes it after each conversation even when it isn't asked to."""

    def of(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Render other messages with the same tools, without a generation prompt that wasn't asked for."""
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=self.tools
        )
        return text if add_generation_prompt else text.removesuffix(self.unasked)


def find_answers(rendering: Rendering, turns: Sequence[int]) -> list[Span]:
    """Returns the span of each turn of the assistant, from the generation prompt to the end of the turn.

    Args:
        rendering: The conversation.
        turns: Numbers of messages, from 0, in order.

    Raises:
        ValueError: An answer can't be found.
    """
    unasked = _unasked_prompt(rendering, next((turn for turn in turns if turn > 0), None))
    rendering = replace(rendering, unasked=unasked, text=rendering.text.removesuffix(unasked))
    spans = _between_prefixes(rendering, turns) or _located(rendering, turns)
    return [(start, _over_eos(rendering, start, end)) for start, end in spans]


def _unasked_prompt(rendering: Rendering, turn: int | None) -> str:
    """The generation prompt of a template that writes it after every conversation, as Llama 3's first one does.

    It precedes an answer, which then has no header of its own, and follows the end of the answer.
    """
    if turn is None or rendering.tokenizer.heeds_generation_prompt(rendering.tools):
        return ""
    mark = next(_unused_characters(rendering.text))
    before = rendering.messages[:turn]
    try:
        text = rendering.of(before)
        head, _, tail = rendering.of([*before, {"role": "assistant", "content": mark}]).partition(mark)
    except ValueError:
        return ""
    if not head.startswith(text) or head[len(text) :].strip():
        return ""
    shared = _common_suffix(text, tail)
    tokens = [(shared.find(token), token) for token in rendering.tokenizer.special_texts if token in shared]
    start, end_token = min(tokens, default=(0, ""))
    prompt = shared[start + len(end_token) :].lstrip()
    is_marker = not prompt and end_token != rendering.tokenizer.eos_text  # no end token, but the next role's marker
    return shared.lstrip() if is_marker else prompt


def _common_suffix(left: str, right: str) -> str:
    length = len(os.path.commonprefix([left[::-1], right[::-1]]))
    return left[len(left) - length :]


def _between_prefixes(rendering: Rendering, turns: Sequence[int]) -> list[Span] | None:
    """The spans, from renderings of the first messages; None if these aren't prefixes of the whole text."""
    messages, text = rendering.messages, rendering.text
    spans = []
    for turn in turns:
        if turn == 0:  # there is no prompt
            return None
        before = rendering.of(messages[:turn], add_generation_prompt=True)
        until = text if turn == len(messages) - 1 else rendering.of(messages[: turn + 1])
        if not (until.startswith(before) and text.startswith(until)):
            return None
        spans.append((len(before), len(until)))
    return spans


def _located(rendering: Rendering, turns: Sequence[int]) -> list[Span]:
    """The spans, as the parts of the text that change with each answer."""
    text = rendering.text
    mark = next(_unused_characters(text))
    prompt = next((_generation_prompt(rendering, turn) for turn in turns if turn > 0), "")
    spans: list[Span] = []
    after = 0
    for turn in turns:
        start, end = _changing_part(rendering, turn, mark)
        # Text between the prompt and the answer, such as an empty thought, is generated too.
        opening = text.rfind(prompt, after, start) if prompt else -1
        if opening >= 0:
            start = opening + len(prompt)
        if start < after:
            raise _cannot_be_split(turn)
        spans.append((start, end))
        after = end
    return spans


def _changing_part(rendering: Rendering, turn: int, mark: str) -> Span:
    """The part of the text that depends on message `turn`, and the end of its turn."""
    messages, text = rendering.messages, rendering.text
    other = {"role": messages[turn]["role"], "content": mark}
    try:
        changed = rendering.of([*messages[:turn], other, *messages[turn + 1 :]])
    except ValueError as error:
        raise _cannot_be_split(turn) from error
    if changed.count(mark) != 1:
        raise _cannot_be_split(turn)
    start = len(os.path.commonprefix([text, changed]))
    shared = len(_common_suffix(text[start:], changed[start:]))
    if turn == len(messages) - 1:
        return start, len(text)
    end = len(text) - shared
    tail = rendering.of([*messages[:turn], other]).partition(mark)[2]
    return start, end + len(_whole_part(os.path.commonprefix([text[end:], tail]), tail, rendering.tokenizer))


def _whole_part(common: str, tail: str, tokenizer: Tokenizer) -> str:
    """The part of the text after a last turn that also follows an earlier turn: all, or up to a special token."""
    if common == tail:
        return common
    ends = [common.rfind(token) + len(token) for token in tokenizer.special_texts if token in common]
    return common[: max(ends)] if ends else common[: len(common) - len(common.lstrip())]


def _generation_prompt(rendering: Rendering, turn: int) -> str:
    """What the template writes before the model's turn."""
    before = rendering.messages[:turn]
    prompted = rendering.of(before, add_generation_prompt=True)
    return prompted[len(os.path.commonprefix([prompted, rendering.of(before)])) :]


def up_to_end_tokens(rendering: Rendering, spans: Sequence[Span]) -> list[Span]:
    """The spans without the white space after an end token, which is never generated."""
    said = [(start, rendering.text[start:end].rstrip(), end) for start, end in spans]
    ends = rendering.tokenizer.special_texts
    return [(start, start + len(text) if text.endswith(ends) else end) for start, text, end in said]


def _over_eos(rendering: Rendering, start: int, end: int) -> int:
    """The end of a turn. It includes a following EOS if the turn has no end token of its own."""
    text, eos = rendering.text, rendering.tokenizer.eos_text
    if end == len(text) or not eos or text[start:end].rstrip().endswith(rendering.tokenizer.special_texts):
        return end
    space = len(text) - end - len(text[end:].lstrip())
    return end + space + len(eos) if text.startswith(eos, end + space) else end


def _unused_characters(text: str) -> Iterator[str]:
    """Private-use characters that don't occur in `text`."""
    return (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _cannot_be_split(turn: int) -> ValueError:
    return ValueError(
        f"the chat template cannot be split into turns: message {turn + 1} is not found in what it renders; set "
        "another tokenizer.chat_template, mark its answers with {% generation %}, or use answer_only_loss=false"
    )
