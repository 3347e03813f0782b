# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: the mean loss per token over a held-out set."""

import logging
import math
from collections.abc import Callable

import torch

from megatron.bridge.data.loaders import EvaluationSteps
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.micro_batches import run_micro_batches
from megatron.bridge.training.monitoring.reported_losses import Total, means, tokens_of
from megatron.bridge.training.setup import SetupOutput

logger = logging.getLogger(__name__)


def evaluate_once(run: SetupOutput, forward_step: Callable, callbacks: CallbackManager) -> None:
    """Evaluate the validation set, unless there is none or it was evaluated at this step since the process started."""
    if run.state.train_state.do_valid and run.state.evaluated_step != run.state.train_state.step:
        evaluate(run, forward_step, callbacks)


@torch.no_grad()
def evaluate(
    run: SetupOutput, forward_step: Callable, callbacks: CallbackManager, *, split: str = "validation"
) -> dict[str, float]:
    """Run the model over one pass of a set and report the mean losses.

    Args:
        run: From `setup`.
        forward_step: From `bind_forward_step`.
        callbacks: Called for each step (`on_eval_…`, or `on_test_…` for the test set) and with the result.
        split: `validation` or `test`.

    Returns:
        The mean loss per token, by name, the same on every rank. With several validation sets, those of all sets
        together, and those of each set under `set/name`.
    """
    event = "eval" if split == "validation" else "test"
    batches = run.valid_data_iterator if split == "validation" else run.test_data_iterator
    context = CallbackContext(run.state, run.model, run.optimizer, run.scheduler)
    step = run.state.train_state.step
    for chunk in run.model:
        chunk.eval()
    callbacks.fire(f"on_{event}_start", context)
    sets = batches if isinstance(batches, dict) else {"": batches}
    of_sets: dict[str, float] = {}
    sums: dict[str, Total] = {}
    for name, steps in sets.items():
        title = f"{split} ({name})" if name else split
        totals = _totals(run, forward_step, callbacks, steps, title=title, event=event, context=context)
        logger.info("step %d: %s over %d samples: %s", step, title, steps.num_samples, _reported(totals))
        of_sets |= {f"{name}/{metric}": value for metric, value in means(totals).items() if name}
        _add(sums, totals)
    if split == "validation":
        run.state.train_state.consumed_valid_samples += sum(steps.num_samples for steps in sets.values())
        run.state.evaluated_step = step
    for chunk in run.model:
        chunk.train()
    context.loss_dict = means(sums) | of_sets
    context.num_tokens = tokens_of(sums.values())
    callbacks.fire(f"on_{event}_end", context)
    return context.loss_dict


def _totals(
    run: SetupOutput,
    forward_step: Callable,
    callbacks: CallbackManager,
    steps: EvaluationSteps,
    *,
    title: str,
    event: str,
    context: CallbackContext,
) -> dict[str, Total]:
    """The metrics of one pass over one set."""
    sums: dict[str, Total] = {}
    is_checked = run.state.cfg.rerun_state_machine.check_for_nan_in_loss
    checked_as = f"{title} at step {run.state.train_state.step}" if is_checked else None
    for micro_batches in steps:
        callbacks.fire(f"on_{event}_step_start", context)
        _add(sums, run_micro_batches(forward_step, micro_batches, run.model, forward_only=True, checked_as=checked_as))
        callbacks.fire(f"on_{event}_step_end", context)
    return sums


def _add(sums: dict[str, Total], totals: dict[str, Total]) -> None:
    for name, total in totals.items():
        sums[name] = sums[name].plus(total) if name in sums else total


def _reported(totals: dict[str, Total]) -> str:
    return ", ".join(_shown(name, value, totals[name]) for name, value in means(totals).items())


def _shown(name: str, value: float, total: Total) -> str:
    """A metric as logged, with its perplexity if it is a mean per token."""
    perplexity = f" (perplexity {math.exp(min(value, 20.0)):.2f})" if total.is_per_token else ""
    return f"{name} {value:.4f}{perplexity}"
