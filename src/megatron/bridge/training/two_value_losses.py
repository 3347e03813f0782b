# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Loss functions of a script's own that give two values, `(loss, reported)`, and say nothing of the tokens.

Core adds up their gradients where ranks share rows, and over data-parallel ranks too with
`model.calculate_per_token_loss`. So a loss must be divided by the tokens of all those ranks. A mean over the tokens of
one rank looks right, and its gradient is as many times too large as there are ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

_LOSSES_OF_TOKENS = 2
"""Dimensions of [B, S]. A mean can't be told by its derivatives by logits, which add up to 0. And Core's and
Transformer Engine's cross-entropy overwrite what they saved in the backward pass, so a second one would be wrong."""


def with_checked_loss(forward_step: Callable) -> Callable:
    """A forward step whose loss function is checked the first time that it trains.

    Args:
        forward_step: Of `(data_iterator, model)`; it returns the stage's output and the loss function.

    Returns:
        Another one. Its loss function raises a ValueError if it gives two values, and the loss is the mean over this
        rank's tokens where Core adds up the gradients of several ranks.
    """
    is_checked = False

    def checked(loss_function: Callable, model: Any, output: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal is_checked
        result = loss_function(output, **kwargs)
        if not is_checked and torch.is_grad_enabled() and isinstance(result, tuple):
            is_checked = True
            if len(result) == 2 and output.dim() == _LOSSES_OF_TOKENS:
                _check_is_no_mean(result[0], output, model)
        return result

    def step(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)
        is_due = not is_checked and callable(loss_function)
        return output, partial(checked, loss_function, args[1]) if is_due else loss_function

    return step


def _check_is_no_mean(loss: torch.Tensor, output: torch.Tensor, model: Any) -> None:
    """Compare what the loss weighs on each rank. Collective over the ranks whose gradients Core adds up.

    A mean's derivatives by the losses of its tokens add up to 1, whatever the tokens are. So of ranks that each take
    their own mean they add up to the number of ranks, and else to 1.

    Args:
        loss: Scalar.
        output: [B, S] losses of tokens.
        model: The chunk.
    """
    is_sum = get_model_config(model).calculate_per_token_loss
    shares_rows = parallel_state.get_context_parallel_world_size() > 1
    group = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if is_sum
        else parallel_state.get_context_parallel_group()
    )
    if dist.get_world_size(group) == 1:
        return
    weight = _weight(loss, output)
    total = torch.stack([weight, (weight != 0).float()])
    dist.all_reduce(total, group=group)
    weights, ranks = total.tolist()
    if ranks > 1 and abs(weights - ranks) < 1e-3 * ranks:
        other = "" if shares_rows else "; or set model.calculate_per_token_loss=false: Core averages over ranks then"
        raise ValueError(
            "the loss function gives two values, and the loss is a mean over the tokens of this rank alone: Core adds "
            f"up the gradients of {int(ranks)} ranks, which makes them {int(ranks)} times too large; give three "
            f"values, the sum of the losses, the number of tokens and what is reported{other}"
        )


def _weight(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The sum of the loss's derivatives by the output, FP32; 0 if it doesn't depend on it."""
    if not loss.requires_grad or not output.requires_grad:
        return torch.zeros((), device=output.device)
    (derivatives,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    weight = torch.zeros((), device=output.device) if derivatives is None else derivatives.float().sum()
    return torch.nan_to_num(weight)
