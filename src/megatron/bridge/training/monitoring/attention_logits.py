# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The largest attention logit of a step. Transformer Engine's attention keeps it where Core's configuration asks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.layer_specs import why_local
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import raise_on_all_ranks

_KEPT = "current_max_attn_logits"
"""Core's attribute of an attention module: the largest logit of each head [heads] since it was set to None."""


def check_attention_can_keep_logits(model: GPTModelProvider) -> None:
    """The layers that the model will get have such attention, before they are built.

    Args:
        model: The provider. What a layer spec of its own has is seen when it is built.

    Raises:
        ValueError: They don't.
    """
    reason = why_local(model)
    if reason is not None:
        raise ValueError(
            f"logger.log_max_attention_logit=true needs Transformer Engine's attention, and this run has Core's local "
            f"one ({reason}), which doesn't keep its logits: set logger.log_max_attention_logit=false"
        )


def check_attention_keeps_logits(model: list[Any]) -> None:
    """Every layer's attention keeps its largest logit. Collective.

    Raises:
        ValueError: On all ranks, if one doesn't.
    """
    with raise_on_all_ranks("looking for attention logits"):
        for name, attention in _attentions(model):
            if not hasattr(attention, _KEPT):
                raise ValueError(
                    f"logger.log_max_attention_logit=true: {name} is a {type(attention).__name__}, which doesn't keep "
                    "its largest logit; leave the option out, or take Transformer Engine's attention"
                )


def forget_attention_logits(model: list[Any]) -> None:
    """Start a step: what an evaluation left doesn't count."""
    for _, attention in _attentions(model):
        setattr(attention, _KEPT, None)


def max_attention_logit(model: list[Any]) -> float:
    """The largest logit of the step just taken, over all layers, heads and ranks; NaN if none was kept. Collective."""
    kept = [value for _, attention in _attentions(model) if (value := getattr(attention, _KEPT)) is not None]
    largest = torch.tensor(float("-inf"), device=current_device())
    for value in kept:
        largest = torch.maximum(largest, value.detach().float().max().to(largest))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    value = float(largest)
    return value if value > float("-inf") else float("nan")


def _attentions(model: list[Any]) -> Iterator[tuple[str, Any]]:
    """The core attention of each of this rank's layers, with its name."""
    for chunk in model:
        for name, module in unwrap_model(chunk).named_modules():
            if name.endswith(".core_attention"):
                yield name, module
