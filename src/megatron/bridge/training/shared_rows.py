# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a forward step gets to know of context parallelism: rows that are cut, and a mean over all ranks of a row.

Shapes: B rows, S sequence, H hidden, V vocabulary, CP ranks that share a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model

from megatron.bridge.models.context_parallel import context_ranks


def on_shared_rows(forward_step: Callable, *, seq_length: int) -> Callable:
    """A forward step whose output is checked, and whose loss is right, where ranks share rows; else itself.

    Args:
        forward_step: Of `(data_iterator, model)`; it returns the stage's output and the loss function.
        seq_length: S, of whole rows.

    Returns:
        Another one. It raises a ValueError if the forward step ran the model on more of a row than is this rank's.
    """
    if context_ranks()[1] == 1:
        return forward_step

    def step(data_iterator: Any, model: Any, *args: Any) -> Any:
        output, loss_function = forward_step(data_iterator, model, *args)
        _check_rows_are_cut(output, model, seq_length=seq_length)
        # Core divides a sum of losses by the tokens of all ranks, but a mean's by those of this rank alone.
        is_sum = get_model_config(model).calculate_per_token_loss
        return output, loss_function if is_sum else partial(_over_all_ranks, loss_function)

    return step


def _check_rows_are_cut(output: Any, model: Any, *, seq_length: int) -> None:
    """Refuse a forward step of a script's own that knows nothing of context parallelism.

    Args:
        output: [B, S / CP] or [B, S / CP, V] of the last stage, [S / CP, B, H] of another, where sequence parallelism
            shares S / CP once more.
        model: This stage's chunk.
        seq_length: S.

    Raises:
        ValueError: It didn't cut the rows.
    """
    size, config = context_ranks()[1], get_model_config(model)
    is_last = getattr(unwrap_model(model), "post_process", True)
    if not isinstance(output, torch.Tensor) or output.dim() < 2:
        return
    shared = 1 if is_last or not config.sequence_parallel else config.tensor_model_parallel_size
    found = output.shape[1 if is_last else 0] * shared
    if found != seq_length // size:
        raise ValueError(
            f"the forward step gave the model {found} positions of a row of {seq_length}, with "
            f"model.context_parallel_size={size}: expected {seq_length // size}; take the batch from "
            "gpt_step.get_batch, which cuts rows, or cut it with models.context_parallel.cut_for_this_rank"
        )


def _over_all_ranks(loss_function: Callable, output: torch.Tensor, **kwargs: Any) -> Any:
    """The loss function's result, with the tokens of all ranks of the row.

    The loss is multiplied by their number: Core averages gradients over them, and these are to add up.
    """
    result = loss_function(output, **kwargs)
    if not isinstance(result, tuple) or len(result) != 3:
        return result  # a script's own sum over the tokens of the whole row, which Core scales for these ranks
    loss, num_tokens, reported = result
    of_all = num_tokens.detach().clone()
    dist.all_reduce(of_all, group=parallel_state.get_context_parallel_group())
    return loss * context_ranks()[1], of_all, reported
