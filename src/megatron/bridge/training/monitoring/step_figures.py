# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Figures of a step that cost work of their own, where `logger` asks for them; and the progress file.

They are computed on all ranks, before any place for figures takes them: `CallbackContext.figures` holds them.
"""

import math
import os
import time
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer, LoggerConfig
from megatron.bridge.training.cpu_offload.overlapped_steps import wait_for_weights
from megatron.bridge.training.monitoring.attention_logits import (
    check_attention_can_keep_logits,
    check_attention_keeps_logits,
    forget_attention_logits,
    max_attention_logit,
)
from megatron.bridge.training.monitoring.energy import Energy
from megatron.bridge.training.monitoring.gradient_figures import NORM_PREFIX
from megatron.bridge.training.monitoring.memory_figures import PREFIX as MEMORY_PREFIX
from megatron.bridge.training.monitoring.memory_figures import check_memory_keys, log_memory, memory_values
from megatron.bridge.training.monitoring.step_times import StepTimes
from megatron.bridge.training.monitoring.whole_model import sum_over_parameters
from megatron.bridge.utils.distributed import is_rank_0

SECONDS_PER_UNIT = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}

PROGRESS_FILE = "progress.txt"


class StepFigures(Callback):
    """Adds to each step's figures what `logger` asks for."""

    reads_weights = False

    def __init__(self, config: LoggerConfig) -> None:
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.throughput_window_size)
        """Operations and seconds of the last steps."""

        self._operations_before = 0.0
        self._started = time.monotonic()
        self._energy = Energy() if config.log_energy else None

    def on_train_start(self, context: CallbackContext) -> None:
        self._operations_before = context.state.train_state.floating_point_operations_so_far
        self._started = time.monotonic()
        if self._config.log_max_attention_logit:
            check_attention_keeps_logits(context.model)
        if self._energy is not None:
            self._energy.start()

    def on_train_step_start(self, context: CallbackContext) -> None:
        if self._config.log_max_attention_logit:
            forget_attention_logits(context.model)

    def on_train_step_end(self, context: CallbackContext) -> None:
        config, state = self._config, context.state
        operations = state.train_state.floating_point_operations_so_far
        self._window.append((operations - self._operations_before, context.taken_step.seconds))
        self._operations_before = operations
        context.figures = {}
        if config.log_throughput or config.log_throughput_to_tensorboard:
            context.figures["throughput"] = tflops_per_device(self._window, state.derived.world_size)
        if config.log_runtime_to_tensorboard:
            elapsed = time.monotonic() - self._started
            context.figures["runtime"] = elapsed / SECONDS_PER_UNIT[config.runtime_time_unit]
        if config.log_world_size_to_tensorboard:
            context.figures["world_size"] = state.derived.world_size
        if context.num_zeros_in_grad is not None:
            context.figures["num_zeros"] = context.num_zeros_in_grad
        context.figures |= {NORM_PREFIX + name: norm for name, norm in context.grad_norms.items()}
        step = state.train_state.step
        if self._energy is not None:
            self._energy.count_step()
        if config.takes_figures_of(step):
            self._add_costly(context)
        if config.log_memory_interval is not None and step % config.log_memory_interval == 0:
            log_memory(config, step)

    def _add_costly(self, context: CallbackContext) -> None:
        """Figures that cost collectives, or a pass over all weights."""
        config = self._config
        if config.log_params_norm:
            wait_for_weights(context.state.cfg, context.model, context.optimizer)
            context.figures["params_norm"] = params_norm(context.model)
        if config.log_max_attention_logit:
            context.figures["max_attention_logit"] = max_attention_logit(context.model)
        if config.log_memory_to_tensorboard:
            context.figures |= {MEMORY_PREFIX + name: value for name, value in memory_values(config).items()}
        if self._energy is not None:
            context.figures |= self._energy.read()


def tflops_per_device(steps: deque[tuple[float, float]], world_size: int) -> float:
    """Floating point operations a second and device, in units of 1e12, over some steps.

    Args:
        steps: Operations of all ranks, and seconds, of each.
        world_size: Ranks, one a device.
    """
    operations, seconds = map(sum, zip(*steps, strict=True))
    return operations / seconds / world_size / 1e12


def params_norm(model: list[Any]) -> float:
    """The L2 norm of the whole model's weights, each counted once, as the model holds them. Collective."""
    squares = sum_over_parameters(model, lambda param: param.float().square().sum(dtype=torch.float64))
    return math.sqrt(squares.item())


class ProgressFile(Callback):
    """`logger.log_progress`: a line in `progress.txt`, beside the checkpoints, at the start and at each save."""

    reads_weights = False

    def __init__(self, directory: str | Path) -> None:
        self._file = Path(directory) / PROGRESS_FILE
        self._operations_at_start = 0.0
        self._started = time.monotonic()

    def on_train_start(self, context: CallbackContext) -> None:
        self._operations_at_start = context.state.train_state.floating_point_operations_so_far
        self._started = time.monotonic()
        self._append(context, "Starting job")

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        if not is_rank_0():
            return
        train_state = context.state.train_state
        # Written in the background, the checkpoint is of an earlier step than the run is at.
        tracker = iterations.read_tracker(self._file.parent)
        saved_step = train_state.step if tracker is None else tracker.iteration
        operations = train_state.floating_point_operations_so_far
        steps = [(operations - self._operations_at_start, time.monotonic() - self._started)]
        throughput = tflops_per_device(deque(steps), context.state.derived.world_size)
        self._append(
            context,
            f"Saved checkpoint\tStep: {saved_step}\tThroughput since the start: {throughput:.3g} TFLOP/s/device"
            f"\tFloating point operations: {operations:.3e}\tSamples: {train_state.consumed_train_samples}",
        )

    def _append(self, context: CallbackContext, text: str) -> None:
        if is_rank_0():
            moment = datetime.now().astimezone().isoformat(timespec="seconds")
            job = os.environ.get("SLURM_JOB_ID", "")
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{moment}\tJob ID: {job}\tDevices: {context.state.derived.world_size}\t{text}\n")


def build_step_figures(cfg: ConfigContainer) -> list[Callback]:
    """The callbacks that `logger` asks for; they come before the places that take figures.

    Args:
        cfg: A checked configuration.

    Raises:
        ValueError: It asks for what this process's device or its attention doesn't have.
    """
    config, save = cfg.logger, cfg.checkpoint.save
    check_memory_keys(config)
    if config.log_max_attention_logit:
        check_attention_can_keep_logits(cfg.model)
    figures: list[Callback] = [StepFigures(config)]
    if config.timing_log_level or config.log_timers_to_tensorboard:
        figures.append(StepTimes(config))
    if config.log_progress:
        assert save is not None  # check_progress_has_a_place refuses it
        figures.append(ProgressFile(save))
    return figures
