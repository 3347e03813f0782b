# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Step only on finite losses and gradients, and save only finite weights.

This costs a step nothing. Core computes the gradient's norm anyway, and it is the same on every rank that steps. Only
if the norm is not finite are the parameters searched. In FP16 the loss scaler skips such steps before this check.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron.bridge.core_repairs.finite_gradients import NonFiniteGradients
from megatron.bridge.training.monitoring.reported_losses import Total, sum_and_count
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.distributed import all_gathered, format_ranks

logger = logging.getLogger(__name__)

CHECKED_LOSS = "lm loss"
"""Name of the loss that is trained on, as `gpt_step` reports it. Other reported metrics may be NaN."""


def checked_loss_of(state: GlobalState) -> str | None:
    """The name of the next step for the error about a NaN loss; None if a NaN loss is not an error."""
    cfg = state.cfg
    # If steps may be skipped, the check of the gradients decides, since a NaN loss has NaN gradients.
    is_checked = cfg.rerun_state_machine.check_for_nan_in_loss and not cfg.train.max_nonfinite_steps
    return f"step {state.train_state.step + 1}" if is_checked else None


def check_loss(
    reported: list[dict[str, Any]], totals: dict[str, Total], *, model: Sequence[torch.nn.Module], where: str
) -> None:
    """Raise if the loss is NaN or infinite. Runs collectives only in that case.

    Args:
        reported: What the loss function reported for each of this rank's micro-batches; empty on stages without one.
        totals: The sums over all ranks, the same on each rank.
        model: This rank's chunks. Their weights are searched for NaN, frozen ones included.
        where: The step, for the error.

    Raises:
        FloatingPointError: On all ranks. Names the ranks that had the loss.
    """
    loss, num_tokens, _ = totals.get(CHECKED_LOSS, Total(0.0, 0.0, True))
    if math.isfinite(loss):
        return
    own = [sum_and_count(CHECKED_LOSS, losses[CHECKED_LOSS], "cpu")[0] for losses in reported if CHECKED_LOSS in losses]
    is_wrong = any(not torch.isfinite(pair).all() for pair in own)
    ranks = [rank for rank, wrong in enumerate(all_gathered(is_wrong)) if wrong]
    weights = all_gathered(
        _nonfinite((name, param) for chunk in model for name, param in unwrap_model(chunk).named_parameters())
    )
    advice = (
        f"Weights were wrong before it ({_summary(weights)}): resume from an earlier checkpoint, or check what was "
        "loaded"
        if any(weights)
        else "Check the data and optimizer.lr"
    )
    raise FloatingPointError(
        f"{where}: the loss over {num_tokens:.0f} tokens is {loss}, on {format_ranks(ranks)}; weights and checkpoints "
        f"are those of the steps before it. {advice}"
    )


def step_if_finite(state: GlobalState, model: list[Any], optimizer: Any) -> tuple[bool, float | None]:
    """Take the optimizer's step, unless a gradient is NaN or infinite.

    Args:
        state: The run; its train state has the number of steps taken.
        model: This rank's chunks, with their gradients.
        optimizer: Megatron optimizer.

    Returns:
        Whether the weights were updated, and the gradient's norm.

    Raises:
        FloatingPointError: On all ranks. Names the step, the parameter and the ranks. No weight has changed.
    """
    try:
        updated, grad_norm, _ = optimizer.step()
    except NonFiniteGradients as found:
        reason = f"the gradient's norm is {found.norm}: {_describe_nonfinite_gradients(model)}"
        return skip_step(state, reason), found.norm
    state.num_nonfinite_steps = 0
    threshold = _norm_above_which_core_skips(state)
    if not updated and grad_norm is not None and threshold < grad_norm < math.inf:
        logger.warning(
            "step %d is skipped: the gradient's norm is %.4g, above optimizer.grad_norm_skip_threshold=%g",
            state.train_state.step + 1,
            grad_norm,
            threshold,
        )
    return updated, None if grad_norm is None else float(grad_norm)


def reasons_to_skip(state: GlobalState) -> str:
    """The reasons for which a step of this run may have been skipped, as text."""
    threshold = _norm_above_which_core_skips(state)
    also = f" or its norm above optimizer.grad_norm_skip_threshold={threshold:g}" if threshold < math.inf else ""
    return f"a gradient was not finite{also}"


def _norm_above_which_core_skips(state: GlobalState) -> float:
    # An option of Core's since 0.19.
    return getattr(state.cfg.optimizer, "grad_norm_skip_threshold", math.inf)


def skip_step(state: GlobalState, reason: str) -> bool:
    """Skip the current step, if the configuration allows it.

    Returns:
        False: the weights were not updated.

    Raises:
        FloatingPointError: More than `train.max_nonfinite_steps` steps in a row were not finite.
    """
    step, allowed = state.train_state.step + 1, state.cfg.train.max_nonfinite_steps
    state.num_nonfinite_steps += 1
    if state.num_nonfinite_steps > allowed:
        after = f" (after {allowed} in a row that were skipped)" if allowed else ""
        raise FloatingPointError(
            f"step {step}: {reason}{after}; weights and checkpoints are those of the steps before it. Check the "
            "step's data and optimizer.lr, or set train.max_nonfinite_steps to skip that many such steps in a row"
        )
    logger.warning("step %d is skipped (train.max_nonfinite_steps=%d): %s", step, allowed, reason)
    return False


def check_weights_are_finite(model: list[Any], step: int) -> None:
    """Raise if a trained weight is NaN or infinite, before it is saved. Collective.

    Args:
        model: This rank's chunks; their trained parameters are checked.
        step: The step to be saved.

    Raises:
        FloatingPointError: On all ranks. Names the first parameter and the ranks.
    """
    names = _nonfinite((name, param.detach()) for name, param in _trained(model))
    by_rank = all_gathered(names)
    if any(by_rank):
        raise FloatingPointError(
            f"step {step} isn't saved: its weights are NaN or infinite ({_summary(by_rank)}); the checkpoints before "
            "it are kept: resume from the newest one"
        )


def _describe_nonfinite_gradients(model: list[Any]) -> str:
    """Which gradients are not finite, on which ranks; the largest one if all are finite. Collective."""
    gradients = [(name, param.main_grad) for name, param in _trained(model)]
    by_rank = all_gathered(_nonfinite(gradients))
    if any(by_rank):
        return _summary(by_rank)
    largest = max(((float(grad.abs().max()), name) for name, grad in gradients if grad.numel()), default=(0.0, ""))
    of_ranks = all_gathered(largest)
    size, name = max(of_ranks)
    return f"too large for FP32, though each gradient is finite; the largest is {size:.3g}, of {name} on rank " + str(
        of_ranks.index((size, name))
    )


def _trained(model: list[Any]) -> list[tuple[str, Any]]:
    """(name, parameter) of all trained parameters; each has Core's `main_grad`."""
    named = [pair for chunk in model for pair in unwrap_model(chunk).named_parameters()]
    return [(name, param) for name, param in named if param.requires_grad]


def _nonfinite(tensors: Any) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity. Waits for the device once."""
    named = list(tensors)
    if not named:
        return []
    are_finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in named]).tolist()
    return [name for (name, _), is_finite in zip(named, are_finite, strict=True) if not is_finite]


def _summary(by_rank: list[list[str]]) -> str:
    """The first tensor that is not finite, the number of others, and the ranks, as text."""
    ranks = [rank for rank, names in enumerate(by_rank) if names]
    names = list(dict.fromkeys(name for of_rank in by_rank for name in of_rank))
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"NaN or infinite in {names[0]}{others}, on {format_ranks(ranks)}"
