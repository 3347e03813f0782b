# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Turn conversations into samples: read them, render them with the chat template, find the assistant's turns."""

from bisect import bisect_right
from typing import Any

from megatron.bridge.data.answers import Rendering, find_answers, up_to_end_tokens
from megatron.bridge.data.messages import Conversation, read_conversation
from megatron.bridge.data.row_notes import Note
from megatron.bridge.data.samples import RenderedSample, Span, nothing_to_learn
from megatron.bridge.data.sft_options import SFTOptions
from megatron.bridge.data.template_omissions import find_omissions
from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, Tokenizer

UNMARKED = Note(
    "an answer has no generation mark",
    "it is not learned, as transformers' assistant mask says; mark it in tokenizer.chat_template if it should be",
)


class ChatFormat:
    """Renders conversations with the tokenizer's chat template. The assistant's turns are learned."""

    adds_bos = False
    adds_eos = False

    def __init__(self, options: SFTOptions, tokenizer: Tokenizer) -> None:
        """Keeps the tokenizer.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.has_chat_template:
            raise ValueError(f"tokenizer {tokenizer.name} has no chat template: set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.answer_only_loss = options.answer_only_loss

    def render(self, row: dict[str, Any]) -> RenderedSample:
        """Renders the conversation; a learned span runs from the generation prompt to the end of the turn.

        Raises:
            ValueError: The row can't be read, the template refuses it, or an answer can't be found in the text.
        """
        said = read_conversation(row)
        if not said.answers and not said.unlearned:
            return nothing_to_learn(f"no message of the assistant (found: {said.roles})", said.notes)
        if not said.answers and self.answer_only_loss:
            return nothing_to_learn("all answers are marked as not to be learned", said.notes)
        rendering = self._render(said)
        notes = (*said.notes, *find_omissions(rendering))
        if self.answer_only_loss and self.tokenizer.marks_answers(said.tools):
            return self._as_marked(rendering, said, notes)
        text = rendering.text
        if self.answer_only_loss:
            if 0 in said.answers:
                raise ValueError("the conversation begins with the assistant: expected a user or system message first")
            learned = up_to_end_tokens(rendering, find_answers(rendering, said.answers))
        elif said.unlearned:
            learned = _around(find_answers(rendering, said.unlearned), len(text))
        else:
            learned = [(0, len(text))]
        return RenderedSample(text, tuple(learned), should_end=True, notes=notes)

    def _render(self, said: Conversation) -> Rendering:
        """Render the messages in the first form that the template accepts.

        Some templates need a tool call's arguments as text, as the row may have them, or content beside a call.
        """
        forms = [said.messages] if said.messages_as_written is None else [said.messages, said.messages_as_written]
        forms += [filled for form in forms if (filled := _with_content(form)) != form]
        refusal: ValueError | None = None
        for form in forms:
            try:
                rendering = self._rendering(form, said)
            except ValueError as error:
                refusal = refusal or error
                continue
            is_last = form is forms[-1]
            if is_last or not any(repr(arguments) in rendering.text for arguments in _objects(form)):
                return rendering
        raise refusal or ValueError("the chat template writes a call's arguments as Python does: expected JSON")

    def _rendering(self, messages: list[dict[str, Any]], said: Conversation) -> Rendering:
        tokenizer = self.tokenizer
        if said.template_kwargs:
            tokenizer = tokenizer.with_chat_template(None, said.template_kwargs)
        return Rendering(tokenizer, messages, said.tools, tokenizer.apply_chat_template(messages, tools=said.tools))

    def _as_marked(self, rendering: Rendering, said: Conversation, notes: tuple[Note, ...]) -> RenderedSample:
        """The sample according to the template's own generation marks, as transformers reads them."""
        ids, offsets, marks = rendering.tokenizer.apply_marked_chat_template(rendering.messages, tools=said.tools)
        if said.unlearned:
            turns = sorted((*said.answers, *said.unlearned))
            ends = [end for _, end in find_answers(rendering, turns)]
            owners = [*turns, None]  # of the tokens up to each end
            marks = [
                mark and owners[bisect_right(ends, start)] not in said.unlearned
                for mark, (start, _) in zip(marks, offsets, strict=True)
            ]
        spans = _runs(offsets, marks)
        if not spans:
            return nothing_to_learn("the chat template's generation marks hold nothing", notes)
        if len(spans) < len(said.answers):
            notes = (*notes, UNMARKED)
        return RenderedSample(
            rendering.text,
            tuple(spans),
            tokens=(ids, offsets),
            has_exact_spans=True,
            should_end=True,
            notes=notes,
        )


def _with_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with empty content added where there is none."""
    return [message if message.get("content") is not None else {**message, "content": ""} for message in messages]


def _objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of all tool calls, if they are non-empty objects."""
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, dict)]
    found = [(call.get("function") or call).get("arguments") for call in calls]
    return [arguments for arguments in found if arguments and isinstance(arguments, dict)]


def _runs(offsets: list[Span], marks: list[int]) -> list[Span]:
    """The characters of each run of marked tokens."""
    spans: list[Span] = []
    was_marked = False
    for (start, end), is_marked in zip(offsets, marks, strict=True):
        if is_marked and was_marked:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        elif is_marked:
            spans.append((start, end))
        was_marked = bool(is_marked)
    return spans


def _around(spans: list[Span], length: int) -> list[Span]:
    """The spans of the text outside `spans`."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), length]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]
