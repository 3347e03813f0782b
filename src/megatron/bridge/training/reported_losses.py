# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a loss function reports beside the loss that is trained on, in each form that scripts have, added up.

A pair (sum, count), as a tensor of two or a tuple, is summed and divided: a mean per token. What has one element, a
tensor or a plain number, is averaged over micro-batches and data-parallel ranks.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Total(NamedTuple):
    """One figure's sum over the micro-batches of all data-parallel ranks."""

    sum: float
    count: float
    """Tokens, or what else the loss function counted; of a plain figure the micro-batches that reported it."""

    is_per_token: bool
    """Whether the loss function gave the count."""

    def plus(self, other: "Total") -> "Total":
        """The total over both."""
        return Total(self.sum + other.sum, self.count + other.count, self.is_per_token and other.is_per_token)


def sum_and_count(name: str, value: Any, device: torch.device | str) -> tuple[torch.Tensor, bool]:
    """One micro-batch's figure as [sum, count].

    Args:
        name: Of the figure, for the error.
        value: What the loss function reported.
        device: To add it up on.

    Returns:
        A tensor [2], float32, and whether the count is the loss function's.

    Raises:
        ValueError: The form is none of those above.
    """
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if not all(isinstance(part, torch.Tensor | numbers.Real) for part in parts):
        raise _unknown_form(name, value)
    flat = [torch.as_tensor(part, device=device).detach().float().reshape(-1) for part in parts]
    elements = torch.cat(flat) if flat else torch.empty(0)
    if elements.numel() == 2:
        return elements, True
    if elements.numel() == 1:
        return torch.cat((elements, torch.ones_like(elements))), False
    raise _unknown_form(name, value)


def _unknown_form(name: str, value: Any) -> ValueError:
    shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    shape = f" of {len(value)}" if isinstance(value, tuple | list) else shape
    return ValueError(
        f"the loss function reports {name!r} as a {type(value).__name__}{shape}: expected a number, a tensor of one "
        "element, or (sum, count) as a tensor of two or a pair"
    )


def means(totals: dict[str, Total]) -> dict[str, float]:
    """The mean of each total; NaN where nothing was counted."""
    return {name: total.sum / total.count if total.count else math.nan for name, total in totals.items()}


def tokens_of(totals: Iterable[Total]) -> int | None:
    """Tokens that counted in a loss; None where no loss function counted any."""
    counts = [total.count for total in totals if total.is_per_token]
    return int(max(counts)) if counts else None
