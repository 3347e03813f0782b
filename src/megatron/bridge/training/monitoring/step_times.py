# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The times that the phases of a step take, by Core's timers: `logger.timing_log_level` and its neighbours.

A custom forward step may time what it likes: `state.timers("my phase", log_level=1).start()`, then `.stop()`.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import LoggerConfig
from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.distributed import all_gathered, is_rank_0

logger = logging.getLogger(__name__)

PREFIX = "timers/"
"""What the names of these figures begin with."""

INTERVAL = "interval"
"""Megatron-LM's name for the whole step."""

OCCASIONS = ("evaluate", "save-checkpoint")
"""Phases that are no part of a step: their time is shown whole, not divided by steps."""


@contextlib.contextmanager
def timed(state: GlobalState, phase: str, level: int) -> Iterator[None]:
    """Time the context, if `logger.timing_log_level` is at least `level`."""
    timer = state.timers(phase, log_level=level)
    timer.start()
    try:
        yield
    finally:
        timer.stop()  # one that is still running can't be started again


@contextlib.contextmanager
def phases_timed(state: GlobalState, model_config: Any, optimizer: Any) -> Iterator[None]:
    """Within the context, Core's schedule and optimizers time their phases, and so does an offloaded step.

    Not around an evaluation: its forward passes would count as those of the next step.

    Args:
        state: The run.
        model_config: Core's configuration of the model, which its schedule reads.
        optimizer: From `setup_optimizer`.
    """
    if not state.cfg.logger.timing_log_level:
        yield
        return
    timed_by = [model_config, *(part.config for part in _parts(optimizer))]
    hybrids = [found.optimizer for found in find_hybrid_optimizers(optimizer)]
    meets, model_config.barrier_with_L1_time = (
        model_config.barrier_with_L1_time,
        state.cfg.logger.barrier_with_L1_time,
    )
    for part in (*timed_by, *hybrids):
        part.timers = state.timers
    try:
        yield
    finally:
        model_config.barrier_with_L1_time = meets
        for part in (*timed_by, *hybrids):
            part.timers = None


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers in a chain that step on something."""
    if isinstance(optimizer, ChainedOptimizer):
        for child in optimizer.chained_optimizers:
            yield from _parts(child)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


class StepTimes(Callback):
    """Adds the timers to a step's figures, and logs a line with them every `log_interval` steps."""

    reads_weights = False

    def __init__(self, config: LoggerConfig) -> None:
        self._config = config
        self._since_line, self._since_figures = _Times(), _Times()

    def on_train_step_end(self, context: CallbackContext) -> None:
        config, state = self._config, context.state
        taken = {INTERVAL: context.taken_step.seconds, **_read_timers(state)}
        step, last = state.train_state.step, state.derived.train_iters
        if config.log_timers_to_tensorboard:
            self._since_figures.add(taken)
            if step % config.tensorboard_log_interval == 0:
                by_rank = all_gathered(self._since_figures.take())
                context.figures |= {PREFIX + name: max(times) for name, times in _by_name(by_rank).items()}
        if config.timing_log_level:
            self._since_line.add(taken)
            if step % config.log_interval == 0 or step in (1, last):
                self._log(step)

    def on_train_end(self, context: CallbackContext) -> None:
        """Log what came after the last line: an evaluation, a save."""
        if self._config.timing_log_level:
            self._since_line.add(_read_timers(context.state), steps=0)
            self._log(context.state.train_state.step)

    def _log(self, step: int) -> None:
        by_name = _by_name(all_gathered(self._since_line.take()))
        option = self._config.timing_log_option
        who = {"max": "slowest rank", "minmax": "fastest to slowest rank", "all": "each rank"}[option]
        if is_rank_0() and by_name:
            shown = ", ".join(f"{name} {_as_text(times, option)}" for name, times in by_name.items())
            logger.info("times up to step %d, in ms of a step or an occasion, %s: %s", step, who, shown)


class _Times:
    """The seconds of some steps, by timer."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    def add(self, seconds: dict[str, float], *, steps: int = 1) -> None:
        for name, value in seconds.items():
            self._seconds[name] += value
        self._steps += steps

    def take(self) -> dict[str, float]:
        """The seconds of a step, or whole, and start again."""
        means = {
            name: seconds if name in OCCASIONS else seconds / max(self._steps, 1)
            for name, seconds in self._seconds.items()
        }
        self._seconds.clear()
        self._steps = 0
        return means


def _read_timers(state: GlobalState) -> dict[str, float]:
    """The seconds of each timer since it was last read; a timer that didn't run isn't there."""
    read = {name: timer.elapsed(reset=True) for name, timer in state.timers._timers.items()}
    return {name: seconds for name, seconds in read.items() if seconds > 0}


def _by_name(by_rank: list[dict[str, float]]) -> dict[str, list[float]]:
    """The times of the ranks that have a timer, in order of the ranks."""
    names = dict.fromkeys(name for of_rank in by_rank for name in of_rank)
    return {name: [of_rank[name] for of_rank in by_rank if name in of_rank] for name in names}


def _as_text(times: list[float], option: str) -> str:
    chosen = {"max": [max(times)], "minmax": [min(times), max(times)], "all": times}[option]
    return (" to " if option == "minmax" else " ").join(f"{1000 * seconds:.2f}" for seconds in chosen)
