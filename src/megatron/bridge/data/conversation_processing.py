# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""For scripts that render conversations themselves: a template's arguments, and the tokens that are learned.

A run's own data doesn't need them: `chat.py` finds the answers in what the template renders, whatever it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.bridge.data.messages import read_template_kwargs, read_tools

__all__ = [
    "AssistantMaskBoundaryConfig",
    "assistant_mask_boundary_config_from_markers",
    "build_assistant_loss_mask",
    "chat_template_kwargs_from_example",
]


@dataclass(frozen=True)
class AssistantMaskBoundaryConfig:
    """The tokens between which the assistant speaks."""

    start_ids: tuple[int, ...]
    """What precedes an answer."""

    end_ids: tuple[int, ...]
    """What ends it."""

    include_end: bool = True
    """Whether the end is learned too; a model that doesn't learn it doesn't stop."""


def assistant_mask_boundary_config_from_markers(
    tokenizer: Any,
    start_marker: str = "<|im_start|>assistant\n",
    end_marker: str = "<|im_end|>",
    *,
    include_end: bool = True,
) -> AssistantMaskBoundaryConfig:
    """The tokens of the texts around an answer.

    Args:
        tokenizer: As made by `build_tokenizer`, or one of transformers.
        start_marker: What a chat template writes before an answer.
        end_marker: What it writes after it.
        include_end: Whether the end is learned.

    Raises:
        ValueError: A marker is empty.
    """
    for name, text in (("start_marker", start_marker), ("end_marker", end_marker)):
        if not text:
            raise ValueError(f"{name} is empty: expected what the chat template writes there")
    start, end = _ids(tokenizer, start_marker), _ids(tokenizer, end_marker)
    return AssistantMaskBoundaryConfig(start, end, include_end)


def build_assistant_loss_mask(
    input_ids: torch.Tensor | Sequence[int], boundary_config: AssistantMaskBoundaryConfig
) -> torch.Tensor:
    """Which tokens are learned: those between each start of an answer and its end, or the end of the row.

    Args:
        input_ids: [S] or [B, S], or a list of S ids.
        boundary_config: The tokens between which the assistant speaks.

    Returns:
        1.0 where a token is learned, else 0.0: float32, of the shape and on the device of `input_ids`. It isn't
        shifted: a token's label stands one place before it.
    """
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2:
        return torch.stack([build_assistant_loss_mask(row, boundary_config) for row in ids])
    mask = torch.zeros(len(ids), dtype=torch.float32)
    tokens, place = ids.tolist(), 0
    while (start := _find(tokens, boundary_config.start_ids, place)) >= 0:
        begin = start + len(boundary_config.start_ids)
        end = _find(tokens, boundary_config.end_ids, begin)
        place = len(tokens) if end < 0 else end + len(boundary_config.end_ids)
        mask[begin : place if boundary_config.include_end or end < 0 else end] = 1
    return mask.to(ids.device)


def chat_template_kwargs_from_example(example: dict[str, Any]) -> dict[str, Any]:
    """What a row gives `apply_chat_template` beside its messages: `tools`, `documents`, and its `chat_template_kwargs`.

    Raises:
        ValueError: One of them can't be understood.
    """
    tools, documents = read_tools(example), example.get("documents")
    given = {"tools": tools} if tools else {}
    return given | ({"documents": documents} if documents else {}) | read_template_kwargs(example)


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    if hasattr(tokenizer, "text_to_ids"):
        return tuple(tokenizer.text_to_ids(text))
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _find(tokens: list[int], wanted: tuple[int, ...], start: int) -> int:
    """The first place from `start` on where the wanted tokens stand; -1: nowhere."""
    places = range(start, len(tokens) - len(wanted) + 1)
    return next((place for place in places if tuple(tokens[place : place + len(wanted)]) == wanted), -1)
