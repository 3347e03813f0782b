# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The training loop: step, count, evaluate, save, stop."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.utils import get_model_config

from megatron.bridge.models.trained_weights import check_trained_as_wrapped
from megatron.bridge.offload_engine.overlap.connect import gradients_cross_early
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.checkpointing import CheckpointManager, CheckpointSaveContext, DefaultCheckpointManager
from megatron.bridge.training.cpu_offload.overlapped_steps import (
    check_overlapped_step,
    wait_for_weights,
    weights_are_late,
)
from megatron.bridge.training.eval import evaluate_split, refuse_non_loss_data
from megatron.bridge.training.micro_batches import bind_forward_step, run_micro_batches
from megatron.bridge.training.monitoring.finite_steps import checked_loss_of, step_if_finite
from megatron.bridge.training.monitoring.flops import train_step_flops
from megatron.bridge.training.monitoring.gradient_figures import (
    GradientFigures,
    read_gradients_if_shown,
    wanted_gradients,
)
from megatron.bridge.training.monitoring.hang_watchdog import shorten_timeouts
from megatron.bridge.training.monitoring.metrics import learning_rate, open_loggers
from megatron.bridge.training.monitoring.preemption import Preempted
from megatron.bridge.training.monitoring.progress import ProgressBar
from megatron.bridge.training.monitoring.reported_losses import means, tokens_of
from megatron.bridge.training.monitoring.router_losses import (
    RouterLosses,
    clear_router_losses,
    forget_router_losses,
    read_router_losses,
)
from megatron.bridge.training.monitoring.step_figures import build_step_figures
from megatron.bridge.training.monitoring.step_times import phases_timed, timed
from megatron.bridge.training.monitoring.trackers import build_loggers
from megatron.bridge.training.setup import SetupOutput
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import raise_on_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainStepResult:
    """Result of one optimizer step."""

    losses: dict[str, float]
    """Mean losses per token over the global batch, by name."""

    num_tokens: int | None
    """Tokens in the loss, over all ranks. None if the loss function doesn't count them."""

    grad_norm: float | None
    """Norm of the whole gradient before clipping. None if it isn't computed (clip_grad=0)."""

    updated: bool
    """False if the step was skipped: a gradient was not finite, or the norm above Core's threshold."""

    router_losses: RouterLosses
    """Losses that the experts' routers added."""

    gradients: GradientFigures | None = None
    """Norms and zeros of the gradients, if `logger` asks for them in this step."""


def train(
    forward_step_func: Callable,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    train_data_iterator: Any,
    valid_data_iterator: Any,
    global_state: GlobalState,
    checkpoint_manager: CheckpointManager | dict[str, Any],
    pg_collection: Any,
    process_non_loss_data_func: Callable | None = None,
    non_loss_data_func: Callable | None = None,
    callback_manager: CallbackManager | None = None,
) -> None:
    """Train what `setup` built, for scripts that call the parts of a run themselves. Figures go where `logger` says.

    Args:
        forward_step_func: See `bind_forward_step`.
        model: As the next seven, from `setup`.
        optimizer: From `setup`.
        scheduler: From `setup`.
        train_data_iterator: From `setup`.
        valid_data_iterator: From `setup`.
        global_state: From `setup`.
        checkpoint_manager: From `setup`, or a checkpointing context.
        pg_collection: From `setup`.
        process_non_loss_data_func: Refused, as `non_loss_data_func`.
        non_loss_data_func: Refused.
        callback_manager: Called around the run and each step.

    Raises:
        ValueError: An argument isn't supported.
        Preempted: A signal stopped the run. The last checkpoint is complete on disk.
    """
    refuse_non_loss_data(process_non_loss_data_func, non_loss_data_func)
    if isinstance(checkpoint_manager, dict):
        context, checkpoint_manager = checkpoint_manager, DefaultCheckpointManager(global_state.cfg.checkpoint)
        checkpoint_manager.checkpointing_context = context
    data = train_data_iterator, valid_data_iterator, None
    run = SetupOutput(global_state, model, optimizer, scheduler, *data, checkpoint_manager, pg_collection)
    users = callback_manager or CallbackManager()
    with raise_on_all_ranks("checking what is logged"):
        loggers = build_loggers(global_state.cfg)
        own = [*build_step_figures(global_state.cfg), ProgressBar(), *loggers]
    callbacks = CallbackManager([*own, *users.callbacks])
    callbacks.user_state = users.user_state
    with open_loggers(loggers, global_state):
        run_training(run, forward_step_func, callbacks)


def run_training(run: SetupOutput, forward_step_func: Callable, callbacks: CallbackManager) -> None:
    """Train up to the configured number of steps. Evaluate and save in between and at the end.

    Args:
        run: From `setup`.
        forward_step_func: See `bind_forward_step`.
        callbacks: Called around the run and each step.

    Raises:
        Preempted: A signal stopped the run. The last checkpoint is complete on disk.
    """
    state, cfg = run.state, run.state.cfg
    forward_step = bind_forward_step(forward_step_func, state)
    context = CallbackContext(state, run.model, run.optimizer, run.scheduler)
    forget_router_losses()
    for chunk in run.model:
        chunk.train()
    if weights_are_late(cfg, run.model):
        callbacks.wait_before_reads(partial(wait_for_weights, cfg, run.model, run.optimizer))
    started = time.monotonic()
    saved_step = state.train_state.step  # nothing to save before the first step
    first_step = saved_step + 1
    callbacks.fire("on_train_start", context)
    check_trained_as_wrapped(run.model)
    is_preempted = _is_preempted(run)
    with _garbage_collection(cfg.train):
        while state.train_state.step < state.derived.train_iters and not is_preempted:
            _take_step(run, forward_step, context, callbacks)
            step = state.train_state.step
            state.watchdog.heartbeat(step)
            if step == first_step:
                shorten_timeouts(state.watchdog, state.cfg.dist)
            _complete_background_save(run, context, callbacks, wait=False)
            if _is_due(step, state.derived.eval_interval) and state.train_state.do_valid:
                with _garbage_collection_around_evaluation(cfg.train), timed(state, "evaluate", 0):
                    evaluate_split(run, forward_step, callbacks)
            is_preempted = _is_preempted(run)
            asked_to_stop = is_preempted or _is_asked_to_stop(cfg.train, step, started)
            if cfg.checkpoint.save and (_is_due(step, cfg.checkpoint.save_interval) or asked_to_stop):
                _save(run, context, callbacks)
                saved_step = step
                is_preempted = is_preempted or _is_preempted(run)
            elif _is_due(step, cfg.checkpoint.non_persistent_save_interval):
                _complete_background_save(run, context, callbacks, wait=True)
                _save_checkpoint(run, non_persistent=True)
            if asked_to_stop:
                logger.info("stopping at step %d of %d", step, state.derived.train_iters)
                break
    wait_for_weights(cfg, run.model, run.optimizer)
    check_overlapped_step(cfg, run.optimizer, num_taken=state.num_taken_steps)
    callbacks.fire("on_train_end", context)
    if cfg.checkpoint.save and saved_step != state.train_state.step:
        _save(run, context, callbacks)
    _complete_background_save(run, context, callbacks, wait=True, ends=True)
    if is_preempted:
        raise Preempted(state.train_state.step)


def train_step(run: SetupOutput, forward_step: Callable, micro_batches: list[dict[str, Any]]) -> TrainStepResult:
    """Take one optimizer step on a global batch.

    Args:
        run: From `setup`.
        forward_step: From `bind_forward_step`.
        micro_batches: This rank's part of the global batch.
    """
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    clear_router_losses()
    timed_phases = phases_timed(run.state, get_model_config(run.model[0]), run.optimizer)
    with timed_phases, gradients_cross_early(run.optimizer):
        totals = run_micro_batches(forward_step, micro_batches, run.model, checked_as=checked_loss_of(run.state))
        router_losses = read_router_losses(run.state.cfg.model, num_micro_batches=len(micro_batches))
        gradients = read_gradients_if_shown(run.state, run.model, run.optimizer)
        check_overlapped_step(run.state.cfg, run.optimizer, num_taken=run.state.num_taken_steps)
        with timed(run.state, "optimizer", 1):
            updated, grad_norm = step_if_finite(run.state, run.model, run.optimizer)
    updated = _on_every_model_parallel_rank(updated)
    run.state.num_taken_steps += updated
    if updated:
        run.scheduler.step(increment=get_current_global_batch_size())
    return TrainStepResult(means(totals), tokens_of(totals.values()), grad_norm, updated, router_losses, gradients)


def _take_step(run: SetupOutput, forward_step: Callable, context: CallbackContext, callbacks: CallbackManager) -> None:
    """One pass of the loop: read the batch, step, count, call the callbacks."""
    train_state, train_config = run.state.train_state, run.state.cfg.train
    update_num_microbatches(train_state.consumed_train_samples, consistency_check=False)
    with timed(run.state, "data-iterator", 1):
        micro_batches = next(run.train_data_iterator)
    batch_size = get_current_global_batch_size()
    if train_state.step + 1 in train_config.iterations_to_skip:
        train_state.skipped_train_samples += batch_size
        train_state.consumed_train_samples += batch_size
        train_state.step += 1
        logger.info("step %d skipped (train.iterations_to_skip)", train_state.step)
        return
    callbacks.fire("on_train_step_start", context)
    context.learning_rate = learning_rate(context)
    context.fp16_loss_scale = float(run.optimizer.get_loss_scale()) if run.state.cfg.model.fp16 else None
    started = time.perf_counter()
    result = train_step(run, forward_step, micro_batches)
    train_state.step += 1
    train_state.consumed_train_samples += batch_size
    if result.num_tokens == 0:
        logger.warning("step %d has no token to learn: it has no loss, and its gradient is zero", train_state.step)
    context.loss_dict, context.grad_norm = result.losses, result.grad_norm
    context.router_losses, context.router_losses_by_layer = result.router_losses
    context.grad_norms, context.num_zeros_in_grad = wanted_gradients(run.state, result.gradients)
    context.skipped_iter, context.num_tokens = not result.updated, result.num_tokens
    context.step_seconds = time.perf_counter() - started
    shapes = [tuple(batch["tokens"].shape) for batch in micro_batches]
    data_parallel_size = run.state.derived.data_parallel_size
    train_state.floating_point_operations_so_far += data_parallel_size * train_step_flops(run.state.cfg.model, shapes)
    tokens = data_parallel_size * sum(batch_size * seq_length for batch_size, seq_length in shapes)
    context.tokens_per_second = tokens / context.step_seconds
    callbacks.fire("on_train_step_end", context)
    if train_config.manual_gc and _is_due(train_state.step, train_config.manual_gc_interval or None):
        gc.collect()


def _save(run: SetupOutput, context: CallbackContext, callbacks: CallbackManager) -> None:
    _complete_background_save(run, context, callbacks, wait=True)
    _save_checkpoint(run)
    if run.state.background_save is None:  # another manager than the default one may write in its own way
        callbacks.fire("on_checkpoint_save", context)


def _complete_background_save(
    run: SetupOutput, context: CallbackContext, callbacks: CallbackManager, *, wait: bool, ends: bool = False
) -> None:
    pending = run.state.background_save
    if pending is None and isinstance(run.checkpoint_manager, DefaultCheckpointManager):
        return
    with run.state.watchdog.paused():
        run.checkpoint_manager.finalize_async_saves(run.state, blocking=wait, terminate=ends)
    save = run.state.cfg.checkpoint.save
    if pending is None or run.state.background_save is pending:
        return
    if save is not None and pending.root == Path(save):
        callbacks.fire("on_checkpoint_save", context)


def _save_checkpoint(run: SetupOutput, *, non_persistent: bool = False) -> None:
    wait_for_weights(run.state.cfg, run.model, run.optimizer)  # a manager of the user's may read weights in its own way
    with run.state.watchdog.paused(), timed(run.state, "save-checkpoint", 0):
        run.checkpoint_manager.save(
            CheckpointSaveContext(
                run.state,
                run.model,
                run.optimizer,
                run.scheduler,
                run.state.train_state.floating_point_operations_so_far,
                non_persistent_ckpt=non_persistent,
                train_data_iterator=run.train_data_iterator,
            )
        )


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _is_asked_to_stop(train_config: Any, step: int, started: float) -> bool:
    """Whether to stop after this step. Rank 0's clock decides, so that all ranks agree."""
    if _is_due(step, train_config.exit_interval):
        return True
    if train_config.exit_duration_in_mins is None:
        return False
    minutes = [(time.monotonic() - started) / 60]
    torch.distributed.broadcast_object_list(minutes, src=0)
    return minutes[0] > train_config.exit_duration_in_mins


def _is_preempted(run: SetupOutput) -> bool:
    """Whether the exit signal has arrived on any rank. Collective only if the signal is caught."""
    return run.state.exit_signal is not None and run.state.exit_signal.has_arrived_anywhere()


def _on_every_model_parallel_rank(updated: bool) -> bool:
    """True only if no rank of the model-parallel group skipped its step."""
    group = mpu.get_model_parallel_group()
    if group.size() == 1:
        return updated
    answer = torch.tensor(int(updated), device=current_device())
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(answer.item())


class _garbage_collection:  # lower case: it is used as a statement
    """Switch Python's garbage collector off within the context, if `train.manual_gc` leaves it to the loop."""

    def __init__(self, train_config: Any) -> None:
        self._manual = train_config.manual_gc

    def __enter__(self) -> None:
        if self._manual:
            gc.disable()
            gc.collect()

    def __exit__(self, *error: Any) -> None:
        if self._manual:
            gc.enable()


@contextlib.contextmanager
def _garbage_collection_around_evaluation(train_config: Any) -> Iterator[None]:
    """Collect all garbage before an evaluation and the youngest after it, with `manual_gc` and `manual_gc_eval`."""
    collects = train_config.manual_gc and train_config.manual_gc_eval
    if collects:
        gc.collect()
    yield
    if collects:
        gc.collect(generation=0)
