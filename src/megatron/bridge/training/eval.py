# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: the mean loss per token over a held-out set."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from megatron.bridge.data.loaders import EvaluationSteps
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.micro_batches import bind_forward_step, run_micro_batches
from megatron.bridge.training.monitoring.reported_losses import Total, means, tokens_of
from megatron.bridge.training.setup import SetupOutput
from megatron.bridge.training.state import GlobalState

logger = logging.getLogger(__name__)


def evaluate_once(run: SetupOutput, forward_step: Callable, callbacks: CallbackManager) -> None:
    """Evaluate the validation set, unless there is none or it was evaluated at this step since the process started."""
    if run.state.train_state.do_valid and run.state.evaluated_step != run.state.train_state.step:
        evaluate_split(run, forward_step, callbacks)


def evaluate(
    state: GlobalState,
    forward_step_func: Callable,
    data_iterator: Any,
    model: list[Any],
    process_non_loss_data_func: Callable | None = None,
    config: ConfigContainer | None = None,
    verbose: bool = False,
    non_loss_data_func: Callable | None = None,
    callback_manager: CallbackManager | None = None,
    is_test: bool = False,
) -> tuple[dict[str, float], None, bool]:
    """Run the model over one pass of a set, for scripts that call the parts of a run themselves.

    Args:
        state: The run.
        forward_step_func: See `bind_forward_step`.
        data_iterator: `valid_data_iterator` or `test_data_iterator` of `setup`.
        model: This rank's chunks.
        process_non_loss_data_func: Refused, as `non_loss_data_func`.
        config: Accepted: the run's.
        verbose: Accepted: the result is logged.
        non_loss_data_func: Refused.
        callback_manager: Called for each step and with the result.
        is_test: Whether it is the test set: other events, and no validation samples are counted.

    Returns:
        The mean loss per token, by name, the same on every rank; None, no other data; False, no time ran out.

    Raises:
        ValueError: An argument isn't supported.
    """
    refuse_non_loss_data(process_non_loss_data_func, non_loss_data_func)
    run = SetupOutput(state, model, None, None, None, data_iterator, data_iterator, None, None)
    callbacks = callback_manager or CallbackManager()
    forward_step = bind_forward_step(forward_step_func, state)
    return evaluate_split(run, forward_step, callbacks, split="test" if is_test else "validation"), None, False


def evaluate_and_print_results(
    state: GlobalState,
    prefix: str,
    forward_step_func: Callable,
    data_iterator: Any,
    model: list[Any],
    config: ConfigContainer | None = None,
    verbose: bool = False,
    write_to_tensorboard: bool = True,
    process_non_loss_data_func: Callable | None = None,
    non_loss_data_func: Callable | None = None,
    callback_manager: CallbackManager | None = None,
    is_test: bool = False,
) -> None:
    """`evaluate`, and log the losses and their perplexities under `prefix`, on TensorBoard too.

    Args:
        state: As for `evaluate`, as all that aren't named here.
        prefix: Where the run is, such as "iteration 10".
        forward_step_func: As for `evaluate`.
        data_iterator: As for `evaluate`.
        model: As for `evaluate`.
        config: As for `evaluate`.
        verbose: As for `evaluate`.
        write_to_tensorboard: Whether to write there.
        process_non_loss_data_func: As for `evaluate`.
        non_loss_data_func: As for `evaluate`.
        callback_manager: As for `evaluate`.
        is_test: As for `evaluate`.
    """
    of_data = forward_step_func, data_iterator, model, process_non_loss_data_func, config, verbose, non_loss_data_func
    losses, _, _ = evaluate(state, *of_data, callback_manager, is_test)
    name_of_set = "test" if is_test else "validation"
    writer = state.tensorboard_logger if write_to_tensorboard else None
    for name, value in losses.items():
        perplexity = math.exp(min(value, 20.0))
        logger.info("%s loss at %s: %s %.6f, perplexity %.6f", name_of_set, prefix, name, value, perplexity)
        if writer is not None:
            writer.add_scalar(f"{name} {name_of_set}", value, state.train_state.step)


def refuse_non_loss_data(
    process_non_loss_data_func: Callable | None = None, non_loss_data_func: Callable | None = None
) -> None:
    """Refuse functions that collect other data than losses.

    Raises:
        ValueError: One is given.
    """
    if process_non_loss_data_func is not None or non_loss_data_func is not None:
        raise ValueError("non_loss_data functions are not supported: leave them out, and take a Callback")


@torch.no_grad()
def evaluate_split(
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
