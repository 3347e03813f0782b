# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Loss functions of a script's own that give two values, `(loss, reported)`, and say nothing of the tokens.

Core adds up their gradients where ranks share rows, and over data-parallel ranks too with
`model.calculate_per_token_loss`. So a loss must be divided by the tokens of all those ranks. A mean over the tokens of
one rank looks right, and its gradient is as many times too large as there are ranks. With both, that option and rows
that ranks share, Core multiplies it once more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

_LOSSES_OF_TOKENS = 2
"""Dimensions of [B, S]. A mean can't be told by its derivatives by logits, which add up to 0. And Core's and
Transformer Engine's cross-entropy overwrite what they saved in the backward pass, so a second one would be wrong."""


def with_checked_loss(forward_step: Callable) -> Callable:
    """A forward step whose loss function is checked when it trains, until two ranks have losses that count.

    In the first micro-batch, as a rule. A rank without a token to learn from weighs nothing, and says nothing.

    Args:
        forward_step: Of `(data_iterator, model)`; it returns the stage's output and the loss function.

    Returns:
        Another one. Its loss function raises a ValueError if it gives two values, and the loss is a mean whose
        gradients Core would add up, or multiply, to several times as much.
    """
    is_checked = False

    def checked(loss_function: Callable, model: Any, output: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal is_checked
        result = loss_function(output, **kwargs)
        if not is_checked and torch.is_grad_enabled() and isinstance(result, tuple):
            has_two = len(result) == 2 and output.dim() == _LOSSES_OF_TOKENS
            is_checked = _is_no_mean(result[0], output, model) if has_two else True
        return result

    def step(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)
        is_due = not is_checked and callable(loss_function)
        return output, partial(checked, loss_function, args[1]) if is_due else loss_function

    return step


def _is_no_mean(loss: torch.Tensor, output: torch.Tensor, model: Any) -> bool:
    """Compare what the loss weighs on each rank. Collective over the ranks whose gradients Core adds up.

    A mean's derivatives by the losses of its tokens add up to 1, whatever the tokens are. So of ranks that each take
    their own mean they add up to the number of ranks, and else to 1.

    Core also multiplies a loss of two values by the ranks that share a row. It averages gradients over them again, but
    not with `calculate_per_token_loss`: there a mean over any tokens is too large.

    Args:
        loss: Scalar.
        output: [B, S] losses of tokens.
        model: The chunk.

    Returns:
        Whether the answer is final: not if the losses of fewer than two ranks count. The same on all ranks.

    Raises:
        ValueError: It is such a mean.
    """
    is_sum = get_model_config(model).calculate_per_token_loss
    sharing = parallel_state.get_context_parallel_world_size()
    group = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if is_sum
        else parallel_state.get_context_parallel_group()
    )
    if dist.get_world_size(group) == 1:
        return True
    weight = _weight(loss, output)
    total = torch.stack([weight, (weight != 0).float()])
    dist.all_reduce(total, group=group)
    weights, counted = total.tolist()
    ranks = int(counted)
    means = {ranks: "this rank alone"}
    if is_sum and sharing > 1:
        means |= {1: "all ranks", max(1, ranks // sharing): "the whole row"}
    found = next((number for number in means if ranks > 1 and abs(weights - number) < 1e-3 * ranks), None)
    if found is not None:
        _refuse(means[found], ranks=ranks, times=found * (sharing if is_sum else 1), sharing=sharing, is_sum=is_sum)
    return ranks > 1


def _refuse(tokens: str, *, ranks: int, times: int, sharing: int, is_sum: bool) -> NoReturn:
    multiplied = f", and multiplies them by model.context_parallel_size={sharing}" if is_sum and sharing > 1 else ""
    is_right_else = tokens == "the whole row" or sharing == 1  # where Core averages
    raise ValueError(
        f"the loss function gives two values, and the loss is a mean over the tokens of {tokens}: Core adds up the "
        f"gradients of {ranks} ranks{multiplied}, which makes them {times} times too large; give three values, the sum "
        "of the losses, the number of tokens and what is reported"
        + ("; or set model.calculate_per_token_loss=false: Core averages over ranks then" if is_right_else else "")
    )


def _weight(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The sum of the loss's derivatives by the output, FP32; 0 if it doesn't depend on it."""
    if not loss.requires_grad or not output.requires_grad:
        return torch.zeros((), device=output.device)
    (derivatives,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    weight = torch.zeros((), device=output.device) if derivatives is None else derivatives.float().sum()
    return torch.nan_to_num(weight)
