# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Only finite losses and gradients are stepped on, and only finite weights are saved.

A step costs nothing for it: Core computes the gradient's norm anyway, and it is the same on every rank that steps.
Only where the norm is not finite are the parameters looked through. FP16's loss scaling skips its steps before that.
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
"""The loss that is trained on, as `gpt_step` reports it; what else a forward step reports may be NaN."""


def checked_loss_of(state: GlobalState) -> str | None:
    """What the loss of the next step is called in an error; None where a NaN in it isn't one."""
    cfg = state.cfg
    # Where steps may be left out, the gradient of such a loss says so.
    is_checked = cfg.rerun_state_machine.check_for_nan_in_loss and not cfg.train.max_nonfinite_steps
    return f"step {state.train_state.step + 1}" if is_checked else None


def check_loss(
    reported: list[dict[str, Any]], totals: dict[str, Total], *, model: Sequence[torch.nn.Module], where: str
) -> None:
    """Refuse a loss that is NaN or infinite. Collective only then.

    Args:
        reported: Of each micro-batch of this rank, what its loss function reported; empty where this stage has none.
        totals: Their sums over all ranks, the same on each.
        model: This rank's chunks; their weights are looked at, frozen ones too.
        where: The step, for the error.

    Raises:
        FloatingPointError: On all ranks; names the ranks whose loss it is.
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
        f"Weights were wrong before it ({_summary(weights)}): resume an earlier checkpoint, or see what was loaded"
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
        state: The run; its train state counts the steps that are done.
        model: This rank's chunks, with their gradients.
        optimizer: Megatron optimizer.

    Returns:
        Whether the weights were updated, and the gradient's norm.

    Raises:
        FloatingPointError: On all ranks; names the step, the parameter and the ranks. No weight was touched.
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
            "step %d is left out: the gradient's norm is %.4g, above optimizer.grad_norm_skip_threshold=%g",
            state.train_state.step + 1,
            grad_norm,
            threshold,
        )
    return updated, None if grad_norm is None else float(grad_norm)


def reasons_to_skip(state: GlobalState) -> str:
    """Why a step of this run may have changed nothing, in a few words."""
    threshold = _norm_above_which_core_skips(state)
    also = f" or its norm above optimizer.grad_norm_skip_threshold={threshold:g}" if threshold < math.inf else ""
    return f"a gradient was not finite{also}"


def _norm_above_which_core_skips(state: GlobalState) -> float:
    # An option of Core's since 0.19.
    return getattr(state.cfg.optimizer, "grad_norm_skip_threshold", math.inf)


def skip_step(state: GlobalState, reason: str) -> bool:
    """Leave out the step that is being taken, where the configuration allows it.

    Returns:
        False: the weights were not updated.

    Raises:
        FloatingPointError: It doesn't, or not as many in a row.
    """
    step, allowed = state.train_state.step + 1, state.cfg.train.max_nonfinite_steps
    state.num_nonfinite_steps += 1
    if state.num_nonfinite_steps > allowed:
        after = f" (after {allowed} in a row that were left out)" if allowed else ""
        raise FloatingPointError(
            f"step {step}: {reason}{after}; weights and checkpoints are those of the steps before it. Look at the "
            "step's data and at optimizer.lr; train.max_nonfinite_steps says how many such steps in a row are left out"
        )
    logger.warning("step %d is left out (train.max_nonfinite_steps=%d): %s", step, allowed, reason)
    return False


def check_weights_are_finite(model: list[Any], step: int) -> None:
    """Refuse to save what can't be trained on. Collective.

    Args:
        model: This rank's chunks; their trained parameters are looked at.
        step: Whose weights they are.

    Raises:
        FloatingPointError: On all ranks; names the first parameter and the ranks.
    """
    names = _nonfinite((name, param.detach()) for name, param in _trained(model))
    by_rank = all_gathered(names)
    if any(by_rank):
        raise FloatingPointError(
            f"step {step} isn't saved: its weights are NaN or infinite ({_summary(by_rank)}); the checkpoints before "
            "it are kept: resume the newest one"
        )


def _describe_nonfinite_gradients(model: list[Any]) -> str:
    """Which gradients are not finite, on which ranks; where each is, the largest. Collective."""
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
    """Name and parameter, which carries Core's `main_grad`."""
    named = [pair for chunk in model for pair in unwrap_model(chunk).named_parameters()]
    return [(name, param) for name, param in named if param.requires_grad]


def _nonfinite(tensors: Any) -> list[str]:
    """The names of those that hold a NaN or an infinity; the device is waited for once."""
    named = list(tensors)
    if not named:
        return []
    are_finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in named]).tolist()
    return [name for (name, _), is_finite in zip(named, are_finite, strict=True) if not is_finite]


def _summary(by_rank: list[list[str]]) -> str:
    """What is not finite and where: the first, and how many others."""
    ranks = [rank for rank, names in enumerate(by_rank) if names]
    names = list(dict.fromkeys(name for of_rank in by_rank for name in of_rank))
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"NaN or infinite in {names[0]}{others}, on {format_ranks(ranks)}"
