# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How rows become samples, said by a class for each kind of row; `dataset_kwargs` says the same in one dictionary."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron.bridge.utils.aliases import TakesAliases
from megatron.bridge.utils.section import Section

__all__ = ["ChatSFTPreprocessingConfig", "PromptCompletionSFTPreprocessingConfig", "SFTPreprocessingConfig"]


@dataclass
class PromptCompletionSFTPreprocessingConfig(Section, metaclass=TakesAliases):
    """Rows with a prompt and its completion, each in a column of its own."""

    _aliases: ClassVar[dict[str, str]] = {
        "prompt_key": "prompt_column",
        "prompt_field": "prompt_column",
        "input_key": "prompt_column",
        "completion_key": "completion_column",
        "completion_field": "completion_column",
        "output_key": "completion_column",
        "label_key": "completion_column",
    }

    prompt_column: str = "input"
    """The column that holds the prompt."""

    completion_column: str = "output"
    """The column that holds what is learned."""

    prompt_template: str | None = None
    """How a row becomes text, with `{column}` names; it ends with the completion's. None: prompt, space, completion."""

    truncation_field: str | None = None
    """The column that is shortened when a sample is too long. None: the prompt's."""

    truncation_method: Literal["left", "right"] = "right"
    """The end of it that is cut off."""

    answer_only_loss: bool = True
    """Whether only the completion is learned."""

    add_bos: bool = False
    """Whether the tokenizer's BOS precedes a sample."""

    add_eos: bool = True
    """Whether the tokenizer's EOS follows a sample."""

    @property
    def names_columns(self) -> bool:
        """Whether the rows are taken as they are, by columns other than those that `process_example_fn` makes."""
        return (self.prompt_column, self.completion_column) != ("input", "output") or self.prompt_template is not None

    def sft_options(self) -> dict[str, Any]:
        """The same as `dataset_kwargs`."""
        prompt = self.prompt_column
        template = self.prompt_template
        if template is None:
            template = f"{{{prompt}}} {{{self.completion_column}}}"
        return {
            "chat": False,
            "prompt_template": template,
            "label_key": self.completion_column,
            "truncation_field": prompt if self.truncation_field is None else self.truncation_field,
            "truncation_method": self.truncation_method,
            "answer_only_loss": self.answer_only_loss,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }


@dataclass
class ChatSFTPreprocessingConfig(Section, metaclass=TakesAliases):
    """Rows with a conversation, rendered by the chat template."""

    _aliases: ClassVar[dict[str, str]] = {
        "messages_key": "messages_column",
        "messages_field": "messages_column",
        "conversation_column": "messages_column",
        "tools_key": "tools_column",
    }

    messages_column: str | None = None
    """The column that holds the messages. None: `messages` or `conversations`."""

    tools_column: str = "tools"
    """The column that holds the tools, if there are any."""

    chat_template: str | None = None
    """Jinja text, or the path of a file that holds it. None: the tokenizer's."""

    chat_template_kwargs: dict[str, Any] | None = None
    """What the template is given beside messages and tools, such as `enable_thinking: false`; a row's own
    `chat_template_kwargs` have the last word."""

    answer_only_loss: bool = True
    """Whether only the assistant's turns are learned."""

    use_hf_tokenizer_chat_template: bool = True
    """Conversations are always rendered by a chat template."""

    @property
    def names_columns(self) -> bool:
        """Whether the rows are taken as they are, by columns other than those that `process_example_fn` makes."""
        return self.messages_column not in (None, "messages", "conversations")

    @property
    def renames(self) -> bool:
        """Whether a column is named, so that a row must go through `renamed`."""
        return self.messages_column is not None or self.tools_column != "tools"

    def sft_options(self) -> dict[str, Any]:
        """The same as `dataset_kwargs`, without the template's."""
        return {
            "chat": True,
            "answer_only_loss": self.answer_only_loss,
            "use_hf_tokenizer_chat_template": self.use_hf_tokenizer_chat_template,
        }

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its columns by their usual names, in place of others that have these names.

        Raises:
            ValueError: It has no such column.
        """
        column = self.messages_column
        names = {self.tools_column: "tools"} if self.tools_column in row else {}
        if column in ("messages", "conversations"):
            names |= {column: column} if column in row else {}
        elif column is not None:
            if column not in row:
                raise ValueError(f"no field {column!r} (found: {', '.join(map(repr, row)) or 'none'})")
            names[column] = "conversations" if _has_speakers(row[column]) else "messages"
        # What else has such a name is another conversation (or other tools) than the one that is asked for.
        displaced = {*names, *names.values()} | ({"messages", "conversations"} if column in names else set())
        kept = {key: value for key, value in row.items() if key not in displaced}
        return kept | {name: row[key] for key, name in names.items()}


def _has_speakers(entries: Any) -> bool:
    """Whether a conversation is written with `from` and `value`."""
    first = entries[0] if isinstance(entries, list) and entries else None
    return isinstance(first, dict) and "from" in first and "role" not in first


SFTPreprocessingConfig = PromptCompletionSFTPreprocessingConfig | ChatSFTPreprocessingConfig
