# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`pretrain`: one run of a configuration, from the first check to the last checkpoint."""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron.bridge.training.callbacks import Callback, CallbackManager, normalize_callbacks
from megatron.bridge.training.config import ConfigContainer, runtime_config_update
from megatron.bridge.training.eval import evaluate_once, evaluate_split
from megatron.bridge.training.initialize import destroy_global_state, initialize_distributed
from megatron.bridge.training.micro_batches import bind_forward_step
from megatron.bridge.training.monitoring.hang_watchdog import watched
from megatron.bridge.training.monitoring.interrupt import ended_by_interrupt
from megatron.bridge.training.monitoring.metrics import MetricsLogger, open_loggers
from megatron.bridge.training.monitoring.preemption import catch_exit_signal
from megatron.bridge.training.monitoring.profiling import build_profilers
from megatron.bridge.training.monitoring.progress import ProgressBar
from megatron.bridge.training.monitoring.step_figures import build_step_figures
from megatron.bridge.training.monitoring.summary import RunSummary, log_start
from megatron.bridge.training.monitoring.trackers import build_loggers
from megatron.bridge.training.setup import maybe_log_and_save_config, setup
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.train import run_training
from megatron.bridge.utils.distributed import raise_on_all_ranks
from megatron.bridge.utils.interpolation import resolve_interpolations
from megatron.bridge.utils.logging import log_to_rank_file


def pretrain(
    config: ConfigContainer,
    forward_step_func: Callable,
    callbacks: Sequence[Callback] | CallbackManager | None = None,
) -> None:
    """Train a model as configured.

    Call it on every rank (torchrun). It uses CUDA with NCCL if there is a GPU, else the CPU with gloo.

    Args:
        config: The run's configuration; `runtime_config_update` may change its sections.
        forward_step_func: Runs the model on one micro-batch, e.g. `gpt_step.forward_step`.
        callbacks: Called after the progress bar and the loggers.

    Raises:
        ValueError, FileNotFoundError: The configuration, the data or a checkpoint is invalid. Raised on all ranks
            before training starts.
        Preempted: A signal stopped the run (`train.exit_signal_handler`). A SystemExit with its own exit code.
        Hung: No rank took a step within the timeout. A SystemExit with its own exit code. A rank that is stuck outside
            a collective ends without an exception.
        Interrupted: SIGINT ended the run. A SystemExit with its own exit code, and a KeyboardInterrupt.
    """
    train_from_config(config, forward_step_func, callbacks, load_required=False)


def train_from_config(
    config: ConfigContainer,
    forward_step_func: Callable,
    callbacks: Sequence[Callback] | CallbackManager | None,
    *,
    load_required: bool,
) -> None:
    """`pretrain`, and `finetune` where `load_required`: a run that finds nothing to load must not start."""
    with ended_by_interrupt(config.checkpoint):
        _run_in_process_group(config, forward_step_func, callbacks, load_required=load_required)


def _run_in_process_group(
    config: ConfigContainer,
    forward_step_func: Callable,
    callbacks: Sequence[Callback] | CallbackManager | None,
    *,
    load_required: bool,
) -> None:
    owns_process_group = initialize_distributed(config)
    try:
        with raise_on_all_ranks("checking the configuration"):
            resolve_interpolations(config)
            log_to_rank_file(config.logger.rank_log_dir)
            runtime_config_update(config)
            summary = RunSummary()
            figures = build_step_figures(config)
            own = [*figures, ProgressBar(), summary, *build_loggers(config), *build_profilers(config)]
            users = normalize_callbacks(callbacks)
            manager = CallbackManager([*own, *users.callbacks])
            manager.user_state = users.user_state
        maybe_log_and_save_config(config)
        with catch_exit_signal(config.train) as exit_signal:
            state = GlobalState(config, exit_signal=exit_signal)
            loggers = [callback for callback in manager.callbacks if isinstance(callback, MetricsLogger)]
            try:
                with open_loggers(loggers, state):
                    _run(state, forward_step_func, manager, summary, load_required=load_required)
            finally:
                state.close()
    finally:
        destroy_global_state()
        if owns_process_group and dist.is_initialized():
            dist.destroy_process_group()


def _run(
    state: GlobalState,
    forward_step_func: Callable,
    callbacks: CallbackManager,
    summary: RunSummary,
    *,
    load_required: bool,
) -> None:
    """Set up, train, and evaluate at the end."""
    run = setup(state, callback_manager=callbacks, load_required=load_required)
    forward_step = bind_forward_step(forward_step_func, state)
    log_start(state, run.model, run.optimizer)
    try:
        with watched(state.watchdog, state.cfg.dist):
            if state.cfg.validation.eval_at_start:
                evaluate_once(run, forward_step, callbacks)
            if state.train_state.do_train:
                run_training(run, forward_step_func, callbacks)
            evaluate_once(run, forward_step, callbacks)
            if state.train_state.do_test:
                evaluate_split(run, forward_step, callbacks, split="test")
    finally:
        summary.log_end(state)
