# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Run a forward step through Megatron-Core's schedules: bind it to the run, feed it micro-batches, sum its losses."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron.bridge.training.monitoring.finite_steps import check_loss
from megatron.bridge.training.monitoring.reported_losses import Total, sum_over_ranks
from megatron.bridge.training.shared_rows import on_shared_rows
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.two_value_losses import with_checked_loss


def bind_forward_step(forward_step_func: Callable, state: GlobalState) -> Callable:
    """Bind a forward step to the run, if it takes one.

    Args:
        forward_step_func: Takes `(state, data_iterator, model)` or `(data_iterator, model)`, and optionally
            `return_schedule_plan`. The first parameter is the run if it is annotated with `GlobalState` or named
            `state` or `global_state`.
        state: The run.

    Returns:
        A function of `(data_iterator, model)`.

    Raises:
        ValueError: The function has other parameters.
    """
    parameters = [
        parameter for parameter in inspect.signature(forward_step_func).parameters.values() if parameter.name != "self"
    ]
    positional = [parameter for parameter in parameters if parameter.name != "return_schedule_plan"]
    first = positional[0] if positional else None
    wants_state = first is not None and (
        first.annotation in (GlobalState, "GlobalState") or first.name in ("state", "global_state")
    )
    if len(positional) == (3 if wants_state else 2):
        bound = partial(forward_step_func, state) if wants_state else forward_step_func
        return _with_heartbeat(with_checked_loss(bound), state)
    names = ", ".join(parameter.name for parameter in parameters)
    raise ValueError(
        f"forward_step_func {getattr(forward_step_func, '__name__', forward_step_func)!r} takes ({names}): "
        "expected (state, data_iterator, model) or (data_iterator, model)"
    )


def _with_heartbeat(forward_step: Callable, state: GlobalState) -> Callable:
    """The forward step, which also tells the hang watchdog that this rank is alive."""

    def step(*args: Any, **kwargs: Any) -> Any:
        state.watchdog.heartbeat(state.train_state.step)
        return forward_step(*args, **kwargs)

    return step


def run_micro_batches(
    forward_step: Callable,
    micro_batches: Sequence[dict[str, Any]],
    model: list[torch.nn.Module],
    *,
    forward_only: bool = False,
    checked_as: str | None = None,
) -> dict[str, Total]:
    """Run one step's micro-batches forward (and backward), and add up the losses over all ranks.

    Args:
        forward_step: From `bind_forward_step`.
        micro_batches: This rank's micro-batches, each `tokens` [B, S]; all of one shape.
        model: This rank's chunks.
        forward_only: Evaluation: no backward pass.
        checked_as: Name of the step in the error for a NaN or infinite loss. None: don't check the loss.

    Returns:
        The total over the global batch of each metric that the loss function reported, the same on every rank.

    Raises:
        ValueError: On all ranks, if a metric on any rank has a form that can't be summed.
        FloatingPointError: On all ranks, if the loss is NaN or infinite.
    """
    batch_size, seq_length = micro_batches[0]["tokens"].shape
    iterators = [iter(micro_batches) for _ in model]
    reported = get_forward_backward_func()(
        forward_step_func=on_shared_rows(forward_step, seq_length=seq_length),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=batch_size,
        decoder_seq_length=seq_length,
        forward_only=forward_only,
    )
    totals = sum_over_ranks(reported)
    if checked_as is not None:
        check_loss(reported, totals, model=model, where=checked_as)
    return totals
